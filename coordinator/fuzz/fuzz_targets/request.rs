//! Each message that the coordinator decodes, by the first byte; what passes the gate must survive the way back.
#![no_main]

use peapod_proto::message::FromWorker;
use peapod_proto::v1;
use prost::Message;

/// A message's words: a loss may be NaN, which equals nothing, or a negative zero, which is left out of the encoding as any zero.
fn words(message: &FromWorker) -> String {
    format!("{message:?}").replace("-0.0,", "0.0,").replace("-0.0 }", "0.0 }")
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 8 {
        0 => {
            let Ok(wire) = v1::FromWorker::decode(bytes) else { return };
            let Ok(message) = FromWorker::try_from(wire) else { return };
            let again = v1::FromWorker::from(message.clone());
            let again = v1::FromWorker::decode(again.encode_to_vec().as_slice()).expect("what was encoded is decoded");
            assert_eq!(words(&FromWorker::try_from(again).expect("what was taken is taken again")), words(&message));
        }
        1 => drop(v1::UploadMessage::decode(bytes)),
        2 => drop(v1::DownloadRequest::decode(bytes)),
        3 => drop(v1::KeepPicture::decode(bytes)),
        4 => drop(v1::StatusRequest::decode(bytes)),
        5 => drop(v1::ShardsRequest::decode(bytes)),
        6 => drop(v1::StopRequest::decode(bytes)),
        _ => drop(v1::DrainRequest::decode(bytes)),
    }
});
