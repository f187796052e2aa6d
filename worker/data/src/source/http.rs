//! Objects behind plain http.

use std::error::Error as _;
use std::ops::Range;

use futures::StreamExt;
use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, IF_MATCH, LAST_MODIFIED, RANGE};
use reqwest::{Client, Response, StatusCode};

use super::remote::{Answer, Failure, Identity};

/// Asks for the bytes in `range`, or all; of the version `identity`, as far as it is known.
pub async fn get(client: &Client, url: &str, range: Option<Range<u64>>, identity: &Identity) -> Result<Answer, Failure> {
    // A tar that a server compresses on the way has other bytes at other places.
    let mut request = client.get(url).header(ACCEPT_ENCODING, "identity");
    if let Some(range) = &range {
        request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end.saturating_sub(1)));
    }
    // A weak tag never matches here; it is compared when the answer is there.
    if let Some(etag) = identity.etag.as_ref().filter(|etag| !etag.starts_with("W/")) {
        request = request.header(IF_MATCH, etag);
    }
    let response = request.send().await.map_err(|error| failure_of(&error))?;
    let mut found = Identity { size: None, etag: header(&response, ETAG), modified: header(&response, LAST_MODIFIED) };
    let content_range = header(&response, CONTENT_RANGE).as_deref().and_then(parse_content_range);
    let part = match (response.status(), content_range) {
        (StatusCode::OK, _) => {
            found.size = content_length(response.headers());
            return Ok(Answer { start: 0, end: found.size, identity: found, is_part: false, body: body_of(response) });
        }
        (StatusCode::PARTIAL_CONTENT, Some((Some(part), size))) => {
            found.size = size;
            part
        }
        // The first bytes of nothing.
        (StatusCode::RANGE_NOT_SATISFIABLE, Some((None, Some(0)))) => {
            found.size = Some(0);
            return Ok(Answer { identity: found, start: 0, end: Some(0), is_part: true, body: futures::stream::empty().boxed() });
        }
        (StatusCode::PARTIAL_CONTENT, _) => return Err(Failure::Lasting("answers a part without saying which".into())),
        (StatusCode::PRECONDITION_FAILED, _) => return Err(Failure::Changed),
        _ => return Err(failure_of_answer(&response, url)),
    };
    Ok(Answer { identity: found, start: part.start, end: Some(part.end), is_part: true, body: body_of(response) })
}

/// Asks which version is there and how large it is.
pub async fn identify(client: &Client, url: &str) -> Result<Identity, Failure> {
    let response = client.head(url).header(ACCEPT_ENCODING, "identity").send().await.map_err(|error| failure_of(&error))?;
    match response.status() {
        StatusCode::OK => {
            let size = content_length(response.headers());
            Ok(Identity { size, etag: header(&response, ETAG), modified: header(&response, LAST_MODIFIED) })
        }
        // An address that is signed for reading answers nothing else.
        StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED => {
            get(client, url, Some(0..1), &Identity::default()).await.map(|answer| answer.identity)
        }
        _ => Err(failure_of_answer(&response, url)),
    }
}

fn body_of(response: Response) -> futures::stream::BoxStream<'static, Result<bytes::Bytes, Failure>> {
    response.bytes_stream().map(|piece| piece.map_err(|error| failure_of(&error))).boxed()
}

fn header(response: &Response, name: HeaderName) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

/// reqwest's own answer counts the bytes of the body, of which HEAD has none.
fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The part and the whole size of `bytes 0-99/1234`, `bytes 0-99/*` or `bytes */1234`.
fn parse_content_range(text: &str) -> Option<(Option<Range<u64>>, Option<u64>)> {
    let (part, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let part = match part.split_once('-') {
        Some((first, last)) => Some(first.trim().parse().ok()?..last.trim().parse::<u64>().ok()?.checked_add(1)?),
        None => None,
    };
    Some((part, size.trim().parse().ok()))
}

/// What some servers say beside the status, in a word.
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");

fn failure_of_answer(response: &Response, url: &str) -> Failure {
    let status = response.status();
    let plain = |code: &String| code.len() < 100 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let code = header(response, ERROR_CODE).filter(plain).map_or_else(String::new, |code| format!(" ({code})"));
    let text = format!("the server answers {status}{code}");
    // A store that an answer points to, or what stands before it, knows nothing of the credentials that were shown.
    let asked = reqwest::Url::parse(url).ok().filter(|url| url.origin() != response.url().origin());
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if asked.is_some() => {
            Failure::Lasting(format!("{text} at {}", response.url().host_str().unwrap_or_default()))
        }
        StatusCode::NOT_FOUND | StatusCode::GONE => Failure::Missing(text),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => Failure::Passing(text),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Failure::Denied(text),
        status if status.is_server_error() => Failure::Passing(text),
        _ => Failure::Lasting(text),
    }
}

fn failure_of(error: &reqwest::Error) -> Failure {
    // Its own text names the address once more; what happened is at the end of the chain.
    let mut text = match error {
        error if error.is_connect() => "cannot connect".to_owned(),
        error if error.is_redirect() => "too many redirects".to_owned(),
        error if error.is_body() || error.is_decode() => "the answer breaks off".to_owned(),
        _ => "no answer".to_owned(),
    };
    let mut source = error.source();
    while let Some(error) = source {
        if error.source().is_none() {
            text = format!("{text}: {error}");
        }
        source = error.source();
    }
    if error.is_builder() || error.is_redirect() { Failure::Lasting(text) } else { Failure::Passing(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read() {
        for (text, wanted) in [
            ("bytes 0-99/1234", Some((Some(0..100), Some(1234)))),
            ("bytes 100-199/*", Some((Some(100..200), None))),
            ("bytes */0", Some((None, Some(0)))),
            ("bytes x-9/10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("items 0-9/10", None),
        ] {
            assert_eq!(parse_content_range(text), wanted, "{text}");
        }
    }
}
