//! Addresses with secrets in them: how they are shown, and what they are an address of.

use std::borrow::Cow;

/// Parameters of a signed address that always belong to its signature, by how they begin.
const SIGNED: [&str; 3] = ["x-amz-", "x-goog-", "x-oss-"];

/// Parameters that hold a signature, and those that belong to it: S3, Google and CloudFront of old; Azure; Tencent.
const SIGNATURES: [(&str, &[&str]); 3] = [
    (
        "signature",
        &["expires", "policy", "key-pair-id", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "accesskeyid", "security-token"],
    ),
    ("sig", &["se", "st", "sp", "sv", "sr", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks", "skv"]),
    ("q-signature", &["q-sign-algorithm", "q-ak", "q-sign-time", "q-key-time", "q-header-list", "q-url-param-list"]),
];

/// An address as it may stand in a log or a report: one of http without its query, which may be signed, and without a password.
#[must_use]
pub fn shown_url(url: &str) -> Cow<'_, str> {
    let Some((scheme, rest)) = url.split_once("://").filter(|(scheme, _)| is_http(scheme)) else { return url.into() };
    let (rest, query) = match rest.find(['?', '#']) {
        Some(at) => (&rest[..at], "?..."),
        None => (rest, ""),
    };
    let authority = &rest[..rest.find('/').unwrap_or(rest.len())];
    let host = authority.rfind('@').map_or(0, |at| at + 1);
    if host == 0 && query.is_empty() { url.into() } else { format!("{scheme}://{}{query}", &rest[host..]).into() }
}

/// An address without its signature: the same for all lists that were signed for the same shards. Other parameters may say which shard is
/// meant.
pub fn unsigned(url: &str) -> Cow<'_, str> {
    let is_of_http = url.split_once("://").is_some_and(|(scheme, _)| is_http(scheme));
    let Some((path, query)) = url.split_once('?').filter(|_| is_of_http) else { return url.into() };
    let name = |parameter: &str| parameter.split('=').next().unwrap_or_default().to_ascii_lowercase();
    let names: Vec<String> = query.split('&').map(name).collect();
    let is_of_signature = |name: &String| {
        let belongs = |(holder, others): &(&str, &[&str])| {
            names.iter().any(|name| name == holder) && (name == holder || others.contains(&name.as_str()))
        };
        SIGNED.iter().any(|start| name.starts_with(start)) || SIGNATURES.iter().any(belongs)
    };
    let kept: Vec<&str> = query.split('&').zip(&names).filter(|(_, name)| !is_of_signature(name)).map(|(parameter, _)| parameter).collect();
    match kept.len() {
        len if len == names.len() => url.into(),
        0 => path.into(),
        _ => format!("{path}?{}", kept.join("&")).into(),
    }
}

fn is_http(scheme: &str) -> bool {
    ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        for (url, wanted) in [
            ("https://host/a/0.tar?X-Amz-Signature=abc", "https://host/a/0.tar?..."),
            ("https://me:secret@host:80/0.tar", "https://host:80/0.tar"),
            ("HTTP://me@host?a@b/c", "HTTP://host?..."),
            ("https://host/a@b/0.tar", "https://host/a@b/0.tar"),
            ("abfs://container@account/0.tar", "abfs://container@account/0.tar"),
            ("/a folder/what?.tar", "/a folder/what?.tar"),
            ("s3://bucket/what?.tar", "s3://bucket/what?.tar"),
        ] {
            assert_eq!(shown_url(url), wanted);
        }
    }

    #[test]
    fn signatures_are_no_part_of_an_address_and_other_parameters_are() {
        for (url, wanted) in [
            ("https://h/0.tar?X-Amz-Date=1&versionId=3&X-Amz-Expires=9&X-Amz-Signature=ab", "https://h/0.tar?versionId=3"),
            ("https://h/0.tar?Expires=1&Signature=ab%3D&Key-Pair-Id=K", "https://h/0.tar"),
            ("https://h/0.tar?sv=2&st=1&se=3&sr=b&sp=r&sig=ab", "https://h/0.tar"),
            ("https://h/get?q-sign-algorithm=sha1&q-ak=x&q-signature=y&name=0.tar", "https://h/get?name=0.tar"),
            // Without a signature the short names mean something else.
            ("https://h/get?se=1&st=2&policy=3", "https://h/get?se=1&st=2&policy=3"),
            ("https://h/get?shard=0", "https://h/get?shard=0"),
            ("s3://bucket/a?sig=1", "s3://bucket/a?sig=1"),
            ("/a?sig=1&se=2", "/a?sig=1&se=2"),
        ] {
            assert_eq!(unsigned(url), wanted);
        }
    }
}
