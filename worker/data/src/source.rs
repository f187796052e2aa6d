//! Where shards lie: expanding the job's patterns and opening one shard.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use peapod_proto::ids::SampleName;

use crate::{Error, Result};

/// Tars are read in pieces of this many bytes.
const READ_BYTES: usize = 256 << 10;

/// Most digits of a number in a range: enough for every shard a job may have, and far from overflow.
const MAX_DIGITS: usize = 9;

/// Expands the entries of `data.shards` into the job's shard list, in order.
///
/// An entry may join several by `::`, hold ranges (`{00000..00123}`, inclusive, zero-padded) and alternatives (`{a,b}`), and, in a local path,
/// the wildcards `*` and `?`, whose matches come in alphabetical order.
///
/// Errors: [`Error::Pattern`] if an entry is empty, a range is malformed, a wildcard matches nothing or the list grows beyond the
/// number of shards a job can name; [`Error::UnsupportedScheme`] and [`Error::Pipe`] for what cannot be read.
pub fn expand_shards(patterns: &[String]) -> Result<Vec<String>> {
    let mut shards = Vec::new();
    for pattern in patterns {
        let fail = |reason: String| Error::Pattern { pattern: pattern.clone(), reason };
        // `pipe:` comes first: nothing of a command line is to be expanded.
        Location::of(pattern)?;
        for part in pattern.split("::") {
            if part.trim().is_empty() {
                return Err(fail("empty (is a `::` left over?)".into()));
            }
            let expanded_len = check_braces(part).map_err(&fail)?;
            if shards.len() as u64 + expanded_len > u64::from(SampleName::LIMIT) {
                return Err(fail(format!("more than {} shards", SampleName::LIMIT)));
            }
            for url in webdataset::braceexpand(part).map_err(|error| fail(error.to_string()))? {
                match Location::of(&url)? {
                    Location::Local(path) if path.contains(['*', '?']) => shards.extend(matching_files(path).map_err(&fail)?),
                    Location::Local(_) => shards.push(url),
                }
            }
        }
    }
    Ok(shards)
}

/// Opens a shard for reading from its start; gzip is undone on the way.
///
/// Errors: [`Error::Open`], [`Error::UnsupportedScheme`], [`Error::Pipe`].
pub fn open(url: &str) -> Result<Box<dyn Read + Send>> {
    let Location::Local(path) = Location::of(url)?;
    let open = || {
        let file = File::open(Path::new(path))?;
        webdataset::shard::compress::decompress(Box::new(BufReader::with_capacity(READ_BYTES, file))).map_err(std::io::Error::other)
    };
    let (_kind, stream) = open().map_err(|source| Error::Open { url: url.into(), source })?;
    Ok(stream)
}

/// How a shard is reached.
enum Location<'a> {
    /// By a path on this host.
    Local(&'a str),
}

impl<'a> Location<'a> {
    fn of(url: &'a str) -> Result<Self> {
        if url.trim_start().starts_with("pipe:") {
            return Err(Error::Pipe { url: url.into() });
        }
        match url.split_once("://") {
            None => Ok(Self::Local(url)),
            Some(("file", path)) => Ok(Self::Local(path)),
            Some((scheme, _)) => Err(Error::UnsupportedScheme { url: url.into(), scheme: scheme.into() }),
        }
    }
}

/// The files that match `path`'s wildcards, in alphabetical order.
fn matching_files(path: &str) -> Result<Vec<String>, String> {
    let matches = glob::glob(path).map_err(|error| error.to_string())?;
    let files = matches
        .map(|entry| {
            let file = entry.map_err(|error| error.to_string())?;
            file.into_os_string().into_string().map_err(|name| format!("{} is not UTF-8", name.display()))
        })
        .collect::<Result<Vec<_>, _>>()?;
    if files.is_empty() { Err(format!("`{path}` matches no file")) } else { Ok(files) }
}

/// Checks the brace groups of one pattern and bounds the number of strings it stands for.
///
/// The expansion itself takes `{00..}` for plain text, and a range with a typing error in it for billions of names.
pub(crate) fn check_braces(pattern: &str) -> Result<u64, String> {
    let mut total = 1_u64;
    let mut open = None;
    for (position, character) in pattern.char_indices() {
        match (character, open) {
            ('{', None) => open = Some(position + 1),
            ('{', Some(_)) => return Err("braces within braces".into()),
            ('}', None) => return Err("`}` without `{`".into()),
            ('}', Some(start)) => {
                total = total.saturating_mul(group_len(&pattern[start..position])?);
                open = None;
            }
            _ => {}
        }
    }
    match open {
        Some(_) => Err("`{` without `}`".into()),
        None => Ok(total),
    }
}

/// The number of strings the inside of a brace group stands for.
fn group_len(group: &str) -> Result<u64, String> {
    let malformed = || format!("`{{{group}}}` is neither a range such as {{00000..00123}} nor a list such as {{a,b}}");
    if group.contains(',') {
        return Ok(group.split(',').count() as u64);
    }
    let parts: Vec<&str> = group.split("..").collect();
    let (first, last, step) = match parts[..] {
        [first, last] => (first, last, "1"),
        [first, last, step] => (first, last, step),
        _ => return Err(malformed()),
    };
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.len() <= MAX_DIGITS && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse::<u64>().ok()).flatten()
    };
    let letter = |text: &str| match text.as_bytes() {
        [byte] if byte.is_ascii_alphabetic() => Some(u64::from(*byte)),
        _ => None,
    };
    let bounds = number(first).zip(number(last)).or_else(|| letter(first).zip(letter(last)));
    match (bounds, number(step)) {
        (Some((first, last)), Some(step)) if step > 0 => Ok(first.abs_diff(last) / step + 1),
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expand(pattern: &str) -> Result<Vec<String>> {
        expand_shards(&[pattern.to_owned()])
    }

    #[test]
    fn ranges_are_inclusive_and_zero_padded() {
        assert_eq!(expand("/d/{00098..00100}.tar").unwrap(), ["/d/00098.tar", "/d/00099.tar", "/d/00100.tar"]);
        assert_eq!(expand("a-{0..1}.tar::b-{x,y}.tar").unwrap(), ["a-0.tar", "a-1.tar", "b-x.tar", "b-y.tar"]);
        assert_eq!(expand("{1..9..4}.tar").unwrap(), ["1.tar", "5.tar", "9.tar"]);
        assert_eq!(expand("plain.tar").unwrap(), ["plain.tar"]);
    }

    #[test]
    fn malformed_patterns_name_what_is_wrong() {
        for (pattern, wanted) in [
            ("", "empty"),
            ("a.tar::", "empty"),
            ("{00..}.tar", "neither a range"),
            ("{..}.tar", "neither a range"),
            ("{}.tar", "neither a range"),
            ("{0..x}.tar", "neither a range"),
            ("{a}.tar", "neither a range"),
            ("{0..9..0}.tar", "neither a range"),
            ("{0..9", "without"),
            ("0..9}", "without"),
            ("{a,{b,c}}", "within braces"),
            ("{0..999999999}.tar", "more than 16777216 shards"),
            ("{a..f..4294967296}.tar", "neither a range"),
            ("{0..99999999999999999999}.tar", "neither a range"),
        ] {
            let error = expand(pattern).unwrap_err();
            assert!(matches!(error, Error::Pattern { .. }) && error.to_string().contains(wanted), "{pattern}: {error}");
        }
    }

    #[test]
    fn schemes_that_cannot_be_read_are_named() {
        assert!(matches!(expand("pipe:cat a::b.tar").unwrap_err(), Error::Pipe { .. }));
        let error = expand("s3://bucket/{0..3}.tar").unwrap_err();
        assert_eq!(error.to_string(), "shard `s3://bucket/{0..3}.tar`: this build reads local paths only, not s3://");
        assert!(matches!(open("https://host/0.tar").err().unwrap(), Error::UnsupportedScheme { scheme, .. } if scheme == "https"));
        assert!(matches!(open("pipe:true").err().unwrap(), Error::Pipe { .. }));
    }

    #[test]
    fn wildcards_match_in_alphabetical_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.tar", "a.tar", "c.txt"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        let root = folder.path().to_str().unwrap();
        assert_eq!(expand(&format!("{root}/*.tar")).unwrap(), [format!("{root}/a.tar"), format!("{root}/b.tar")]);
        assert!(expand(&format!("{root}/*.tgz")).unwrap_err().to_string().contains("matches no file"));
    }

    #[test]
    fn a_missing_shard_is_an_error_that_names_it() {
        assert!(open("/no/such/shard.tar").err().unwrap().to_string().starts_with("open /no/such/shard.tar: "));
    }

    proptest! {
        #[test]
        fn any_pattern_expands_or_is_refused(pattern in "[a-c0-3{}.,:\\\\/]{0,12}") {
            if let Ok(shards) = expand(&pattern) {
                prop_assert!(shards.len() <= SampleName::LIMIT as usize);
            }
        }
    }
}
