#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = peapod_data::fuzzing::cached(bytes);
});
