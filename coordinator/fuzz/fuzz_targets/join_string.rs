//! What people paste.
#![no_main]

use peapod_proto::secure::{JoinString, Token};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = Token::parse(text);
    if let Ok(join) = text.parse::<JoinString>() {
        assert_eq!(join.reveal().parse::<JoinString>().expect("it is one").reveal(), join.reveal());
    }
});
