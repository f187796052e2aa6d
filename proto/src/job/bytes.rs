//! Sizes as people write them: 500000000, "500MB", "2GiB".

use std::fmt;

use schemars::{Schema, SchemaGenerator, json_schema};
use serde::{Deserializer, Serializer, de};

/// The powers of 1000 and of 1024, with the longest name of each first: "MiB" ends in "B" too.
const UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("kB", 1000),
    ("B", 1),
];

/// A size in the largest unit of which it is a whole number, so that it is read back as it was.
pub fn shown(bytes: u64) -> String {
    let (unit, size) = UNITS.into_iter().find(|(_, size)| bytes >= *size && bytes.is_multiple_of(*size)).unwrap_or(("B", 1));
    format!("{}{unit}", bytes / size)
}

/// Reads what [`shown`] writes, also with a fraction, a space before the unit, and in capitals or small letters.
fn parse(text: &str) -> Option<u64> {
    let text = text.trim();
    let is_end = |end: &str, unit: &str| end.eq_ignore_ascii_case(unit);
    let cut = |unit: &str| text.split_at_checked(text.len().checked_sub(unit.len())?).filter(|(_, end)| is_end(end, unit));
    let (number, size) = UNITS.into_iter().find_map(|(unit, size)| Some((cut(unit)?.0.trim_end(), size)))?;
    // A sign or an exponent is no size, though it is a number.
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(size),
        // Two to the 53rd is 8192 TiB: below it a size has all its digits in an f64.
        Err(_) => number
            .parse::<f64>()
            .ok()
            .map(|part| (part * size as f64).round())
            .filter(|bytes| *bytes < 2_f64.powi(53))
            .map(|bytes| bytes as u64),
    }
}

pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&shown(*value))
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    struct Size;

    impl de::Visitor<'_> for Size {
        type Value = u64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a size")
        }

        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }

        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            bytes.try_into().map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            parse(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }

    deserializer.deserialize_any(Size)
}

pub fn schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "bytes" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_of_both_kinds() {
        for (text, bytes) in [
            ("500MB", 500_000_000),
            ("2GiB", 2 << 30),
            ("1.5 GiB", 3 << 29),
            ("100gib", 100 << 30),
            ("64 KB", 64_000),
            ("0B", 0),
            (" 7 B ", 7),
        ] {
            assert_eq!(parse(text), Some(bytes), "{text}");
        }
        for text in ["", "MB", "500", "500M", "-1GB", "1e3MB", "1.2.3GB", "99999999999TiB", "9999999999999.5TB", "5 Mo", "é"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn size_is_shown_short_and_is_read_back() {
        for (bytes, text) in [(0, "0B"), (256 << 20, "256MiB"), (100 << 30, "100GiB"), (500_000_000, "500MB"), (1001, "1001B")] {
            assert_eq!((shown(bytes).as_str(), parse(text)), (text, Some(bytes)));
        }
    }
}
