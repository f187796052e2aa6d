//! From the entries of `data.shards` to the job's shard list.

use std::io::Read;

use peapod_proto::ids::SampleName;

use super::{Location, Sources, shown_url};
use crate::{Error, Result};

/// Most digits of a number in a range: enough for every shard a job may have, and far from overflow.
const MAX_DIGITS: usize = 9;

/// A list of shards larger than this is a mistake: a tar named with an `@` before it, say.
const MAX_LIST_BYTES: u64 = 256 << 20;

/// Expands patterns of any kind, in order; see [`expand_shards`](super::expand_shards).
pub fn expand(sources: &Sources, patterns: &[String]) -> Result<Vec<String>> {
    let mut shards = Vec::new();
    for pattern in patterns {
        match pattern.strip_prefix('@') {
            None => expand_one(sources, pattern, &mut shards)?,
            Some(list) => {
                for line in read_list(sources, pattern, list)?.lines().map(str::trim) {
                    if line.starts_with('@') {
                        return Err(Error::Pattern { pattern: pattern.clone(), reason: format!("`{line}`: a list within a list") });
                    }
                    if !line.is_empty() && !line.starts_with('#') {
                        expand_one(sources, line, &mut shards)?;
                    }
                }
            }
        }
    }
    Ok(shards)
}

/// Files whose names begin with a dot are matched by a pattern that says so alone, as in a shell: other systems leave their own there
/// beside a shard (`._00000.tar`).
pub const NOT_HIDDEN: glob::MatchOptions =
    glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// The text of a list of shards, which may lie anywhere a shard may.
fn read_list(sources: &Sources, pattern: &str, url: &str) -> Result<String> {
    let mut text = String::new();
    let mut list = sources.open(url, || false)?.take(MAX_LIST_BYTES);
    list.read_to_string(&mut text).map_err(|source| Error::Open { url: url.into(), source })?;
    if text.len() as u64 == MAX_LIST_BYTES {
        return Err(Error::Pattern { pattern: pattern.into(), reason: format!("a list of {MAX_LIST_BYTES} bytes or more") });
    }
    // Some programs begin UTF-8 with a mark of byte order.
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

fn expand_one(sources: &Sources, pattern: &str, shards: &mut Vec<String>) -> Result<()> {
    let fail = |reason: String| Error::Pattern { pattern: pattern.into(), reason };
    // `pipe:` comes first: nothing of a command line is to be expanded.
    Location::of(pattern)?;
    for part in split_list(pattern) {
        if part.trim().is_empty() {
            return Err(fail("empty (is a `::` left over?)".into()));
        }
        let expanded_len = check_braces(part).map_err(&fail)?;
        check_len(shards.len() as u64 + expanded_len).map_err(&fail)?;
        for url in webdataset::braceexpand(part).map_err(|error| fail(error.to_string()))? {
            match Location::of(&url)? {
                Location::Local(path) if has_wildcard(path) => shards.extend(matching_files(path).map_err(&fail)?),
                Location::Local(path) if is_folder(path) => {
                    let folder = path.trim_end_matches('/');
                    return Err(fail(format!("`{path}` is a folder; `{folder}/*.tar` names the shards in it")));
                }
                Location::Http if has_wildcard_in_path(&url) => {
                    let url = shown_url(&url);
                    return Err(fail(format!("`{url}`: http has no listing, so wildcards cannot be matched; give a range or an @list")));
                }
                Location::Store(_) if has_wildcard_in_path(&url) => {
                    shards.extend(super::remote::matching_objects(sources.remote()?, &url, &sources.options)?);
                }
                Location::Local(_) | Location::Http | Location::Store(_) => shards.push(url),
            }
            check_len(shards.len() as u64).map_err(&fail)?;
        }
    }
    Ok(())
}

fn check_len(len: u64) -> Result<(), String> {
    if len > u64::from(SampleName::LIMIT) { Err(format!("more than {} shards", SampleName::LIMIT)) } else { Ok(()) }
}

/// The parts of a `::` list. What stands in square brackets is left whole: it may be the address of a host.
fn split_list(pattern: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_usize);
    let bytes = pattern.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'[' => depth += 1,
            b']' => depth = depth.saturating_sub(1),
            b':' if depth == 0 && bytes.get(at + 1) == Some(&b':') => {
                parts.push(&pattern[start..at]);
                at += 1;
                start = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    parts.push(&pattern[start..]);
    parts
}

fn has_wildcard(path: &str) -> bool {
    path.contains(['*', '?']) || path.find('[').is_some_and(|open| path[open..].contains(']'))
}

/// Whether a URL's path has wildcards. A `?` begins a query in one of http; a host may stand in square brackets.
fn has_wildcard_in_path(url: &str) -> bool {
    let Some((scheme, rest)) = url.split_once("://") else { return false };
    let path = rest.find('/').map_or("", |slash| &rest[slash..]);
    if scheme.starts_with("http") { has_wildcard(path.split('?').next().unwrap_or_default()) } else { has_wildcard(path) }
}

/// Whether a path is a folder's. What has an extension is not looked at: each of a list of many shards would cost a request to a shared
/// disk.
fn is_folder(path: &str) -> bool {
    let path = std::path::Path::new(path);
    path.extension().is_none() && path.is_dir()
}

/// The files that match `path`'s wildcards, in alphabetical order.
fn matching_files(path: &str) -> Result<Vec<String>, String> {
    // The library never gives such files where they are left out, not even for a pattern that begins with a dot.
    let means_hidden = path.split('/').any(|part| part.starts_with('.') && has_wildcard(part));
    let options = glob::MatchOptions { require_literal_leading_dot: !means_hidden, ..NOT_HIDDEN };
    let matches = glob::glob_with(path, options).map_err(|error| error.to_string())?;
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
    use crate::source::expand_shards;

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
        assert!(matches!(expand("a.tar::pipe:cat b").unwrap_err(), Error::Pipe { .. }));
        let error = expand("ftp://host/{0..3}.tar").unwrap_err();
        assert_eq!(error.to_string(), "`ftp://host/{0..3}.tar`: ftp:// is none of file, http, https, s3, gs, az");
    }

    #[test]
    fn wildcards_match_in_alphabetical_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.tar", "a.tar", "c.txt", "._a.tar", ".b.tar"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        let root = folder.path().to_str().unwrap();
        assert_eq!(expand(&format!("{root}/*.tar")).unwrap(), [format!("{root}/a.tar"), format!("{root}/b.tar")]);
        assert_eq!(expand(&format!("{root}/.*.tar")).unwrap(), [format!("{root}/._a.tar"), format!("{root}/.b.tar")]);
        assert!(expand(&format!("{root}/*.tgz")).unwrap_err().to_string().contains("matches no file"));
        let error = expand(&format!("{root}/")).unwrap_err().to_string();
        assert!(error.ends_with(&format!("is a folder; `{root}/*.tar` names the shards in it")), "{error}");
    }

    #[test]
    fn character_classes_are_wildcards() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a1.tar", "a2.tar", "a3.tar"] {
            std::fs::write(folder.path().join(name), b"").unwrap();
        }
        let root = folder.path().to_str().unwrap();
        assert_eq!(expand(&format!("{root}/a[13].tar")).unwrap(), [format!("{root}/a1.tar"), format!("{root}/a3.tar")]);
    }

    #[test]
    fn lists_are_read_from_files() {
        let folder = tempfile::tempdir().unwrap();
        let (list, nested) = (folder.path().join("list.txt"), folder.path().join("nested.txt"));
        std::fs::write(&list, "# the first part\nb-{0..1}.tar\n\n  http://host/c.tar::d.tar\n").unwrap();
        std::fs::write(&nested, format!("@{}\n", list.display())).unwrap();
        let patterns = ["a.tar".to_owned(), format!("@{}", list.display())];
        let marked = folder.path().join("marked.txt");
        std::fs::write(&marked, "\u{feff}e.tar\r\nf.tar\r\n").unwrap();
        assert_eq!(expand(&format!("@{}", marked.display())).unwrap(), ["e.tar", "f.tar"]);
        assert_eq!(expand_shards(&patterns).unwrap(), ["a.tar", "b-0.tar", "b-1.tar", "http://host/c.tar", "d.tar"]);
        assert!(expand(&format!("@{}", nested.display())).unwrap_err().to_string().contains("a list within a list"));
        assert!(expand("@/no/such/list").unwrap_err().to_string().starts_with("open /no/such/list: "));
    }

    #[test]
    fn http_is_not_listed_but_may_have_a_query_and_a_numeric_host() {
        let error = expand("http://host/*.tar").unwrap_err().to_string();
        assert!(error.contains("http has no listing") && error.contains("@list"), "{error}");
        let urls = ["http://[::1]:80/a.tar", "http://host/b.tar?key=1&x=[2]"];
        assert_eq!(expand(&urls.join("::")).unwrap(), urls);
        assert_eq!(expand("http://host/{0..1}.tar?k").unwrap(), ["http://host/0.tar?k", "http://host/1.tar?k"]);
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
