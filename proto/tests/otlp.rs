//! Spans reach a collector, under the trace that travels with calls. By itself in its process, as it changes the environment.
#![cfg(feature = "otlp")]
#![allow(clippy::unwrap_used, reason = "in a test program helpers may panic too, and not only the functions that clippy.toml excepts")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::mpsc;
use std::time::Duration;

use peapod_proto::program::{LogArgs, otlp, start};
use peapod_proto::trace::Trace;
use peapod_proto::work_span;

/// Answers each request with 200, and hands on its first line and its body.
fn collector() -> (String, mpsc::Receiver<(String, Vec<u8>)>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (sender, received) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
            let (head, body) = loop {
                let length = stream.read(&mut part).unwrap();
                assert_ne!(length, 0, "half a request");
                bytes.extend_from_slice(&part[..length]);
                let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else { continue };
                let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
                let announced = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse::<usize>().ok()).unwrap();
                if bytes.len() >= end + 4 + announced {
                    break (head, bytes.split_off(end + 4));
                }
            };
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").unwrap();
            if sender.send((head.lines().next().unwrap().to_owned(), body)).is_err() {
                return;
            }
        }
    });
    (address, received)
}

fn contains(body: &[u8], part: &[u8]) -> bool {
    body.windows(part.len()).any(|window| window == part)
}

// In a runtime, as the coordinator is: an exporter that blocks must not mind.
#[tokio::test]
async fn spans_of_a_session_are_exported_under_the_trace_that_its_calls_carry() {
    let (address, received) = collector();
    // SAFETY: no other thread of this process touches the environment: this is its only test, and the collector's thread does not.
    unsafe { std::env::set_var("OTEL_EXPORTER_OTLP_ENDPOINT", &address) };
    start("test", LogArgs::default(), std::io::sink).unwrap();

    let session = Trace::begin(work_span!("session", rank = 3));
    let upload = session.child(work_span!(parent: session.span(), "upload", step = 7));
    let request = upload.request(());
    let header = request.metadata().get("traceparent").unwrap().to_str().unwrap().to_owned();
    // What the coordinator makes of the call.
    let taken = Trace::follow(work_span!("taken"), request.metadata());
    drop((taken, upload, session));
    otlp::finish();

    let (first_line, mut body) = received.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(first_line, "post /v1/traces http/1.1");
    while let Ok((_, more)) = received.recv_timeout(Duration::from_millis(200)) {
        body.extend(more);
    }
    for name in ["session", "upload", "taken", "peapod-test", "rank", "step"] {
        assert!(contains(&body, name.as_bytes()), "{name}");
    }
    let bytes =
        |text: &str| -> Vec<u8> { (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap()).collect() };
    let fields: Vec<&str> = header.split('-').collect();
    let (trace_id, span_id) = (bytes(fields[1]), bytes(fields[2]));
    let times = |part: &[u8]| body.windows(part.len()).filter(|window| *window == part).count();
    assert_eq!(times(&trace_id), 3, "one trace for all three");
    assert_eq!(times(&span_id), 2, "the call is a span, and the parent of what became of it");
}
