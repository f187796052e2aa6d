//! The zip container of torch.save: a central directory of entries that are stored, not compressed.
//!
//! Only what such files use is read (zip64 included), each entry in place; nothing is allocated that the file does not really list.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Fault;

const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const CENTRAL_HEADER: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const END_64_LOCATOR: &[u8] = b"PK\x06\x07";
const LOCAL_HEADER_BYTES: usize = 30;
const CENTRAL_HEADER_BYTES: usize = 46;
const END_BYTES: usize = 22;
const END_64_LOCATOR_BYTES: usize = 20;
/// The extra field that holds the numbers too long for their own fields.
const EXTRA_64: u16 = 1;
/// What stands in a field whose number is in the zip64 extra field.
const IN_EXTRA: u64 = u32::MAX as u64;
const ENCRYPTED: u16 = 1;

/// Whether a file begins like a zip file.
pub(super) fn is_zip(file: &[u8]) -> bool {
    file.starts_with(LOCAL_HEADER)
}

/// The entries of a zip file, by name.
pub(super) struct Archive<'a> {
    file: &'a [u8],
    entries: BTreeMap<&'a str, Record>,
}

/// What the central directory says of an entry.
struct Record {
    flags: u16,
    method: u16,
    stored_bytes: u64,
    bytes: u64,
    local_header: u64,
}

impl<'a> Archive<'a> {
    /// Reads the central directory.
    pub(super) fn open(file: &'a [u8]) -> Result<Self, Fault> {
        let damaged = || Fault::Zip(format!("its central directory is missing or damaged: the file ({} bytes) may be cut off", file.len()));
        let (num_entries, mut at) = find_directory(file).ok_or_else(damaged)?;
        let mut entries = BTreeMap::new();
        for _ in 0..num_entries {
            let (name, record, end) = central_entry(file, at).ok_or_else(damaged)?;
            let name = std::str::from_utf8(name).map_err(|_| Fault::Zip("an entry's name is not UTF-8".into()))?;
            if entries.insert(name, record).is_some() {
                return Err(Fault::Zip(format!("entry {name:?} is there twice")));
            }
            at = end;
        }
        Ok(Self { file, entries })
    }

    /// The names of all entries.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.entries.keys().copied()
    }

    /// As [`Archive::find`]; `None` if there is no such entry.
    pub(super) fn find_if_there(&self, name: &str) -> Result<Option<Range<usize>>, Fault> {
        if self.entries.contains_key(name) { self.find(name).map(Some) } else { Ok(None) }
    }

    /// Where the content of an entry lies in the file.
    pub(super) fn find(&self, name: &str) -> Result<Range<usize>, Fault> {
        let record = self.entries.get(name).ok_or_else(|| Fault::Zip(format!("entry {name:?} is missing")))?;
        if record.flags & ENCRYPTED != 0 || record.method != 0 || record.stored_bytes != record.bytes {
            return Err(Fault::Zip(format!("entry {name:?} is compressed or encrypted; torch.save stores entries as they are")));
        }
        content(self.file, record).ok_or_else(|| Fault::Zip(format!("entry {name:?} lies outside the file")))
    }
}

/// The number of entries and where the directory begins.
fn find_directory(file: &[u8]) -> Option<(u64, usize)> {
    // The end record is the last thing in the file, but for a comment whose length it knows.
    let earliest = file.len().saturating_sub(END_BYTES + usize::from(u16::MAX));
    let end = (earliest..=file.len().checked_sub(END_BYTES)?)
        .rev()
        .find(|&at| file[at..].starts_with(END) && read_u16(file, at + 20).map(usize::from) == Some(file.len() - at - END_BYTES))?;
    let locator = end.checked_sub(END_64_LOCATOR_BYTES).filter(|&at| file[at..].starts_with(END_64_LOCATOR));
    let Some(locator) = locator else {
        return Some((read_u16(file, end + 10)?.into(), read_u32(file, end + 16)? as usize));
    };
    let end_64 = usize::try_from(read_u64(file, locator + 8)?).ok()?;
    file.get(end_64..)?.starts_with(END_64).then_some(())?;
    Some((read_u64(file, end_64 + 32)?, usize::try_from(read_u64(file, end_64 + 48)?).ok()?))
}

/// The name and record of the directory's entry at `at`, and where the next one begins.
fn central_entry(file: &[u8], at: usize) -> Option<(&[u8], Record, usize)> {
    let header = file.get(at..at.checked_add(CENTRAL_HEADER_BYTES)?)?;
    header.starts_with(CENTRAL_HEADER).then_some(())?;
    let length = |offset| read_u16(header, offset).map(usize::from);
    let name_end = at + CENTRAL_HEADER_BYTES + length(28)?;
    let extra_end = name_end + length(30)?;
    let (name, extra) = (file.get(at + CENTRAL_HEADER_BYTES..name_end)?, file.get(name_end..extra_end)?);

    let mut long = extra_64(extra);
    let mut number = |offset| {
        let short = u64::from(read_u32(header, offset)?);
        if short == IN_EXTRA { take_u64(&mut long) } else { Some(short) }
    };
    // The long numbers stand in this order.
    let (bytes, stored_bytes, local_header) = (number(24)?, number(20)?, number(42)?);
    let record = Record { flags: read_u16(header, 8)?, method: read_u16(header, 10)?, stored_bytes, bytes, local_header };
    Some((name, record, extra_end + length(32)?))
}

/// The content of the zip64 extra field; empty if there is none.
fn extra_64(mut extra: &[u8]) -> &[u8] {
    while let (Some(id), Some(length)) = (read_u16(extra, 0), read_u16(extra, 2)) {
        let Some(field) = extra.get(4..4 + usize::from(length)) else { break };
        if id == EXTRA_64 {
            return field;
        }
        extra = &extra[4 + usize::from(length)..];
    }
    &[]
}

/// Where an entry's content lies. The local header repeats the name, and has extra fields of its own.
fn content(file: &[u8], record: &Record) -> Option<Range<usize>> {
    let header = file.get(usize::try_from(record.local_header).ok()?..)?;
    header.starts_with(LOCAL_HEADER).then_some(())?;
    let start = (file.len() - header.len()) + LOCAL_HEADER_BYTES + usize::from(read_u16(header, 26)?) + usize::from(read_u16(header, 28)?);
    let end = start.checked_add(usize::try_from(record.bytes).ok()?)?;
    (end <= file.len()).then_some(start..end)
}

fn read_array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    read_array(bytes, at).map(u16::from_le_bytes)
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    read_array(bytes, at).map(u32::from_le_bytes)
}

fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    read_array(bytes, at).map(u64::from_le_bytes)
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

/// Writes a zip file of stored entries whose contents begin at multiples of 64 bytes, as torch.save's do.
///
/// Errors: the number of bytes it would need, if that is beyond 4 GiB.
pub(super) fn write(entries: &[(String, Vec<u8>)]) -> Result<Vec<u8>, u64> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let local_header = file.len();
        let unpadded = local_header + LOCAL_HEADER_BYTES + name.len() + 4;
        let padding = unpadded.next_multiple_of(ALIGNMENT) - unpadded;
        let fields = common_fields(name, content);

        file.extend_from_slice(LOCAL_HEADER);
        file.extend_from_slice(&fields);
        file.extend_from_slice(&(4 + padding as u16).to_le_bytes());
        file.extend_from_slice(name.as_bytes());
        file.extend_from_slice(PADDING_ID);
        file.extend_from_slice(&(padding as u16).to_le_bytes());
        file.resize(file.len() + padding, 0);
        file.extend_from_slice(content);

        directory.extend_from_slice(CENTRAL_HEADER);
        directory.extend_from_slice(&VERSION.to_le_bytes());
        directory.extend_from_slice(&fields);
        // No extra field, no comment, disk 0, no attributes.
        directory.extend_from_slice(&[0; 12]);
        directory.extend_from_slice(&(local_header as u32).to_le_bytes());
        directory.extend_from_slice(name.as_bytes());
    }
    let (start, num_entries) = (file.len(), entries.len() as u16);
    file.extend_from_slice(&directory);
    let total = file.len() as u64;
    if total >= IN_EXTRA || entries.len() >= usize::from(u16::MAX) {
        return Err(total);
    }
    file.extend_from_slice(END);
    file.extend_from_slice(&[0; 4]);
    file.extend_from_slice(&num_entries.to_le_bytes());
    file.extend_from_slice(&num_entries.to_le_bytes());
    file.extend_from_slice(&(directory.len() as u32).to_le_bytes());
    file.extend_from_slice(&(start as u32).to_le_bytes());
    file.extend_from_slice(&[0; 2]);
    Ok(file)
}

const ALIGNMENT: usize = 64;
/// The extra field that torch pads with.
const PADDING_ID: &[u8] = b"FB";
/// The version of the zip format that is needed for plain stored entries: 1.0.
const VERSION: u16 = 10;
/// 1 January 1980, midnight: the format's first moment, so that the same weights give the same bytes.
const DATE: u16 = 1 << 5 | 1;

/// The fields that the local and the central header share, from the version up to the length of the name.
fn common_fields(name: &str, content: &[u8]) -> Vec<u8> {
    let length = (content.len() as u32).to_le_bytes();
    let mut fields = VERSION.to_le_bytes().to_vec();
    // No flags, stored, midnight.
    fields.extend_from_slice(&[0; 6]);
    fields.extend_from_slice(&DATE.to_le_bytes());
    fields.extend_from_slice(&crc32fast::hash(content).to_le_bytes());
    fields.extend_from_slice(&length);
    fields.extend_from_slice(&length);
    fields.extend_from_slice(&(name.len() as u16).to_le_bytes());
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        write(&[("a/one".into(), b"first".to_vec()), ("a/two".into(), vec![]), ("a/three".into(), vec![7; 100])]).unwrap()
    }

    #[test]
    fn what_is_written_is_found_again_at_aligned_places() {
        let file = sample();
        let archive = Archive::open(&file).unwrap();
        assert_eq!(archive.names().collect::<Vec<_>>(), ["a/one", "a/three", "a/two"]);
        for (name, content) in [("a/one", &b"first"[..]), ("a/two", b""), ("a/three", &[7; 100])] {
            let range = archive.find(name).unwrap();
            assert_eq!((&file[range.clone()], range.start % ALIGNMENT), (content, 0));
        }
        assert!(archive.find("a/four").unwrap_err().to_string().contains("\"a/four\" is missing"));
        assert_eq!(archive.find_if_there("a/four").unwrap(), None);
    }

    #[test]
    fn every_cut_off_file_is_refused() {
        let file = sample();
        for length in 0..file.len() {
            assert!(Archive::open(&file[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn compressed_entries_are_refused_by_name() {
        let mut file = sample();
        let central = file.windows(4).position(|bytes| bytes == CENTRAL_HEADER).unwrap();
        file[central + 10] = 8;
        let archive = Archive::open(&file).unwrap();
        assert!(archive.find("a/one").unwrap_err().to_string().contains("\"a/one\" is compressed"));
        assert!(archive.find("a/two").is_ok());
    }
}
