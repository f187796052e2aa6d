//! JSON as Python writes it: `json.dumps` has words for numbers that JSON lacks and writes halves of characters, and `json.loads` reads
//! both.

/// The words.
const NOT_NUMBERS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];

/// The json with null for each NaN, Infinity and -Infinity outside of strings; `None` if there is none. Which of them stand where a value
/// may is left to the parser.
#[must_use]
pub fn without_not_numbers(json: &[u8]) -> Option<Vec<u8>> {
    let mut changed = Vec::with_capacity(json.len());
    let (mut rest, mut in_string, mut num_found) = (json, false, 0);
    while let Some(&byte) = rest.first() {
        let len = match byte {
            b'\\' if in_string => 2.min(rest.len()),
            b'"' => {
                in_string = !in_string;
                1
            }
            // A word, or the part of a word that follows its sign, as a whole: a longer one that begins like this is another.
            b'-' | b'A'..=b'Z' | b'a'..=b'z' if !in_string => {
                let len = 1 + rest[1..].iter().take_while(|byte| byte.is_ascii_alphanumeric()).count();
                if NOT_NUMBERS.contains(&&rest[..len]) {
                    changed.extend_from_slice(b"null");
                    (rest, num_found) = (&rest[len..], num_found + 1);
                    continue;
                }
                len
            }
            _ => 1,
        };
        let (same, after) = rest.split_at(len);
        changed.extend_from_slice(same);
        rest = after;
    }
    (num_found > 0).then_some(changed)
}

/// The json with a mark of replacement (U+FFFD) for each escape of half a character (`\ud83d` without `\ude00` behind it, or the reverse),
/// which is no text; `None` if there is none. They come from captions that were cut to a length.
#[must_use]
pub fn without_half_characters(json: &[u8]) -> Option<Vec<u8>> {
    let (mut changed, mut at, mut num_found) = (json.to_vec(), 0, 0);
    while let Some(backslash) = json.get(at..).and_then(|rest| rest.iter().position(|&byte| byte == b'\\')) {
        at += backslash;
        at += match (escaped_unit(json, at), escaped_unit(json, at + ESCAPE_BYTES)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 2 * ESCAPE_BYTES,
            (Some(0xd800..=0xdfff), _) => {
                changed[at..at + ESCAPE_BYTES].copy_from_slice(b"\\ufffd");
                num_found += 1;
                ESCAPE_BYTES
            }
            (Some(_), _) => ESCAPE_BYTES,
            // A backslash may itself be escaped.
            (None, _) => 2,
        };
    }
    (num_found > 0).then_some(changed)
}

const ESCAPE_BYTES: usize = 6;

/// The unit of UTF-16 that is escaped here (`\uXXXX`).
fn escaped_unit(json: &[u8], at: usize) -> Option<u16> {
    let digits = json.get(at..at + ESCAPE_BYTES)?.strip_prefix(b"\\u")?;
    // `from_str_radix` would take a sign.
    let is_hex = digits.iter().all(u8::is_ascii_hexdigit);
    is_hex.then(|| u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_null_outside_of_strings() {
        let changed = |text: &str| without_not_numbers(text.as_bytes()).map(|bytes| String::from_utf8(bytes).unwrap());
        let text = r#"{"least": -Infinity, "most": [Infinity,NaN], "named": "-Infinity \" NaN", "NaN": 1}"#;
        let wanted = r#"{"least": null, "most": [null,null], "named": "-Infinity \" NaN", "NaN": 1}"#;
        assert_eq!(changed(text).as_deref(), Some(wanted));
        for same in [r#"{"a": "NaN"}"#, r#"{"a": NaNs, "b": -1, "c": true}"#, "\"\\", ""] {
            assert_eq!(changed(same), None, "{same}");
        }
    }

    #[test]
    fn halves_of_characters_are_replaced_and_whole_ones_stay() {
        let changed = |text: &str| without_half_characters(text.as_bytes()).map(|bytes| String::from_utf8(bytes).unwrap());
        for (text, wanted) in [
            (r#"{"a": "红 \ud83d"}"#, r#"{"a": "红 \ufffd"}"#),
            (r#"{"a\uDE00": "\ud83d\ud83d\ude00x"}"#, r#"{"a\ufffd": "\ufffd\ud83d\ude00x"}"#),
            (r#""\\\ude00\u0041\ud83d\u0041""#, r#""\\\ufffd\u0041\ufffd\u0041""#),
        ] {
            assert_eq!(changed(text).as_deref(), Some(wanted));
        }
        for same in [r#""\ud83d\ude00""#, r#""\\ud83d""#, r#""\ud83"#, r#""\u+83d""#, r#""红 \n""#, "\\", ""] {
            assert_eq!(changed(same), None, "{same}");
        }
    }
}
