//! JSON as Python writes it: `json.dumps` has words for numbers that JSON lacks, and `json.loads` reads them.

/// The words.
const NOT_NUMBERS: [&[u8]; 3] = [b"NaN", b"Infinity", b"-Infinity"];

/// The json with null for each NaN, Infinity and -Infinity outside of strings; `None` if there is none. Which of them stand where a value may is
/// left to the parser.
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
}
