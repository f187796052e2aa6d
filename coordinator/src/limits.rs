//! How large a worker's messages may be, by kind: looked at as they begin to arrive, before any memory is set aside for them.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use peapod_proto::MAX_MESSAGE_BYTES;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::Request;
use tower::Layer;

/// The one call whose messages are of many kinds.
const JOIN_PATH: &str = "/peapod.v1.Membership/Join";
/// A message is preceded by a flag and its length (the gRPC protocol over HTTP/2, "Length-Prefixed-Message").
const PREFIX_BYTES: usize = 5;
/// The first message of a stream: nobody knows yet who sends it.
const MAX_HELLO_BYTES: u32 = 16 << 10;

/// The largest message of a kind, which is told by the field of `FromWorker.message` that it begins with.
fn largest(field: u8) -> (&'static str, u32) {
    match field {
        1 => ("hello", MAX_HELLO_BYTES),
        2 => ("ready", 4 << 10),
        3 => ("heartbeat", 4 << 10),
        4 => ("bootstrap", 64 << 10),
        5 => ("step report", 64 << 20),
        // Whoever was long without a coordinator says every step of that time at once: ten bytes or so a sample, so millions of samples. In
        // memory a message can be fifty times as large, so that a larger one would be a danger.
        6 => ("stopped", MAX_MESSAGE_BYTES as u32),
        7 => ("lease request", 4 << 10),
        8 => ("shard report", 64 << 20),
        9 => ("failure", 1 << 20),
        10 => ("leaving", 64 << 10),
        11 => ("gave back", 4 << 10),
        12 => ("continuing", MAX_MESSAGE_BYTES as u32),
        _ => ("message of an unknown kind", 64 << 10),
    }
}

/// Follows the messages in a stream of bytes.
#[derive(Debug, Default)]
struct Gauge {
    prefix: Vec<u8>,
    /// Bytes of the current message that are still to come, once its prefix is whole.
    left: Option<u32>,
    length: u32,
    is_first_byte: bool,
    /// Messages before the current one.
    num_messages: u64,
}

impl Gauge {
    /// Takes the next bytes; the error says which message is too large.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while let Some(&next) = bytes.first() {
            let Some(left) = self.left else {
                let num = (PREFIX_BYTES - self.prefix.len()).min(bytes.len());
                self.prefix.extend_from_slice(&bytes[..num]);
                bytes = &bytes[num..];
                if let [_, a, b, c, d] = self.prefix[..] {
                    self.length = u32::from_be_bytes([a, b, c, d]);
                    self.prefix.clear();
                    self.is_first_byte = true;
                    self.begin(self.length);
                    if self.num_messages == 0 && self.length > MAX_HELLO_BYTES {
                        return Err(too_large("first message of a stream", self.length, MAX_HELLO_BYTES));
                    }
                }
                continue;
            };
            if self.is_first_byte {
                self.is_first_byte = false;
                // A protobuf tag: the field's number above three bits of its type. All fields of the message have tags of one byte.
                let (kind, largest) = largest(next >> 3);
                if self.length > largest {
                    return Err(too_large(kind, self.length, largest));
                }
            }
            let num = (left as usize).min(bytes.len());
            bytes = &bytes[num..];
            if num as u32 == left {
                self.num_messages += 1;
                self.left = None;
            } else {
                self.left = Some(left - num as u32);
            }
        }
        Ok(())
    }

    fn begin(&mut self, length: u32) {
        if length == 0 {
            self.num_messages += 1;
        }
        self.left = (length > 0).then_some(length);
    }
}

fn too_large(what: &str, length: u32, largest: u32) -> String {
    format!("a {what} of {length} bytes: the most is {largest}")
}

/// A request's body whose messages are measured.
struct Measured {
    body: Body,
    gauge: Gauge,
}

impl HttpBody for Measured {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)) else { return Poll::Ready(None) };
        let frame = frame?;
        if let Some(bytes) = frame.data_ref()
            && let Err(problem) = self.gauge.take(bytes)
        {
            return Poll::Ready(Some(Err(Status::resource_exhausted(problem))));
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Measures the messages of workers' streams.
#[derive(Debug, Clone, Copy)]
pub struct SizeLimits;

impl<S> Layer<S> for SizeLimits {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited { inner }
    }
}

/// A service behind [`SizeLimits`].
#[derive(Debug, Clone)]
pub struct Limited<S> {
    inner: S,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Limited<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> S::Future {
        if request.uri().path() != JOIN_PATH {
            return self.inner.call(request);
        }
        self.inner.call(request.map(|body| Body::new(Measured { body, gauge: Gauge::default() })))
    }
}

#[cfg(test)]
mod tests {
    use peapod_proto::v1;
    use peapod_proto::v1::from_worker::Message;

    use super::*;

    /// A message as it begins on the wire: prefix, and the tag of the field it consists of.
    fn begin(field: u8, length: u32) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&[field << 3 | 2]);
        bytes
    }

    fn hello() -> Vec<u8> {
        [begin(1, 4), vec![0; 3]].concat()
    }

    #[test]
    fn message_that_is_too_large_for_its_kind_is_refused_by_its_first_bytes() {
        for (field, words) in [(3, "heartbeat"), (2, "ready"), (9, "failure"), (15, "unknown kind")] {
            let mut gauge = Gauge::default();
            gauge.take(&hello()).unwrap();
            let problem = gauge.take(&begin(field, 100 << 20)).unwrap_err();
            assert!(problem.contains(words) && problem.contains("104857600"), "{problem}");
        }
        let mut gauge = Gauge::default();
        gauge.take(&hello()).unwrap();
        gauge.take(&begin(12, 60 << 20)).unwrap();
    }

    #[test]
    fn first_message_is_small_whatever_it_calls_itself() {
        let problem = Gauge::default().take(&begin(6, MAX_HELLO_BYTES + 1)).unwrap_err();
        assert!(problem.contains("first message"), "{problem}");
    }

    #[test]
    fn messages_are_told_apart_however_the_bytes_are_cut() {
        let mut bytes = hello();
        bytes.extend([0, 0, 0, 0, 0]);
        bytes.extend(begin(3, 100));
        bytes.extend(vec![0xff; 99]);
        let end = bytes.len();
        bytes.extend(begin(3, 5000));
        for step in [1, 2, 3, 7, 50, bytes.len()] {
            let mut gauge = Gauge::default();
            let refused_at = bytes.chunks(step).position(|chunk| gauge.take(chunk).is_err()).expect("the last one is refused");
            assert!((refused_at + 1) * step > end, "cut by {step}");
        }
    }

    #[test]
    fn kinds_are_the_fields_of_the_protocol() {
        use prost::Message as _;
        for (message, kind) in [
            (Message::Hello(v1::Hello::default()), "hello"),
            (Message::Ready(v1::Ready::default()), "ready"),
            (Message::Heartbeat(v1::Heartbeat::default()), "heartbeat"),
            (Message::Bootstrap(v1::Bootstrap::default()), "bootstrap"),
            (Message::StepReport(v1::StepReport::default()), "step report"),
            (Message::Stopped(v1::Stopped::default()), "stopped"),
            (Message::LeaseRequest(v1::LeaseRequest::default()), "lease request"),
            (Message::ShardReport(v1::ShardReport::default()), "shard report"),
            (Message::Failure(v1::WorkerFailure::default()), "failure"),
            (Message::Leaving(v1::Leaving::default()), "leaving"),
            (Message::GaveBack(v1::GaveBack::default()), "gave back"),
            (Message::Continuing(v1::Continuing::default()), "continuing"),
        ] {
            let bytes = v1::FromWorker { message: Some(message) }.encode_to_vec();
            assert_eq!(largest(bytes[0] >> 3).0, kind);
        }
    }
}
