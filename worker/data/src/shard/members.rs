//! The members of a tar, in order.
//!
//! The library's iterator reads a name, or what else precedes a member, whole, however long its header says that it is. Here no header
//! reserves memory, and none of them is quoted as it is: what is no tar may hold anything.

use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader, Header, PaxExtensions};

const BLOCK_BYTES: usize = 512;

/// Nothing that describes the next member is larger: a name is a path, and attributes of files are shorter.
const MAX_DESCRIPTION_BYTES: u64 = 1 << 20;

/// Bytes reserved for a member before any of it has come.
const RESERVED_BYTES: u64 = 1 << 20;

/// Zeros behind a tar's end that are read, in search of another tar: those who write tars fill up with some 10 KiB at most.
const MAX_ZERO_BYTES: u64 = 1 << 20;

/// Bytes that are shown of what is no tar.
const SHOWN_BYTES: usize = 32;

/// What is known of a member before it is read.
#[derive(Debug)]
pub struct Member {
    /// Its path, of at most [`MAX_DESCRIPTION_BYTES`].
    pub name: Vec<u8>,
    pub kind: EntryType,
    /// Bytes that it takes in the tar.
    pub size: u64,
}

/// Reads a tar from member to member.
pub struct Members<R> {
    tar: R,
    /// Where in the tar the next byte lies.
    at: u64,
    /// Behind the last byte of the current member, which padding follows.
    end: u64,
}

impl<R: Read> Members<R> {
    pub fn new(tar: R) -> Self {
        Self { tar, at: 0, end: 0 }
    }

    /// Goes on to the next member, whatever is left of the current one; `None` at the end of the tar.
    ///
    /// The end is a block of zeros. A tar without one, which ends where a member does, is in use and is whole. What follows the zeros is
    /// read too: another tar where several were joined (`cat a.tar b.tar`, which `tar --ignore-zeros` reads), or the end of the stream,
    /// where a checksum is compared.
    pub fn advance(&mut self) -> io::Result<Option<Member>> {
        let (mut long_name, mut pax) = (None, None);
        while let Some(header) = self.header(long_name.is_some() || pax.is_some())? {
            let size = header.entry_size().map_err(|_| self.damaged("it has no size"))?;
            // What came before the two kinds of headers that have extensions gives these letters another meaning, or none.
            let is_extended = header.as_gnu().is_some() || header.as_ustar().is_some();
            match header.entry_type() {
                EntryType::GNULongName if is_extended => long_name = Some(self.description(size)?),
                EntryType::XHeader if is_extended => pax = Some(self.description(size)?),
                // Where a link points, and what holds for all members, is of no use here.
                EntryType::GNULongLink | EntryType::XGlobalHeader if is_extended => self.begin(size)?,
                _ => return self.member(&header, size, long_name, pax.as_deref()).map(Some),
            }
        }
        Ok(None)
    }

    /// Reads the current member, of which nothing has been read yet.
    ///
    /// The buffer grows with what arrives. A stream that ends early must not pass for a short member.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let size = self.end - self.at;
        let mut bytes = Vec::with_capacity(size.min(RESERVED_BYTES) as usize);
        let len = self.tar.by_ref().take(size).read_to_end(&mut bytes)? as u64;
        self.at += len;
        if len < size {
            let words = format!("a member of {size} bytes breaks off after {len}");
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, words));
        }
        // It grew by doubling, and is kept for long.
        bytes.shrink_to_fit();
        Ok(bytes)
    }

    /// The next header, behind what is left of the current member; `None` at the end of the tar, which is an error while one
    /// `is_described`.
    fn header(&mut self, is_described: bool) -> io::Result<Option<Header>> {
        self.skip()?;
        let mut header = Header::new_old();
        let mut start = self.at;
        let mut len = self.fill(header.as_mut_bytes())?;
        let is_zero = |header: &Header, len: usize| len == BLOCK_BYTES && header.as_bytes().iter().all(|&byte| byte == 0);
        let end = start;
        if is_described && (len == 0 || is_zero(&header, len)) {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it breaks off between a member's name and the member"));
        }
        while is_zero(&header, len) {
            start = self.at;
            if start - end > MAX_ZERO_BYTES {
                return Ok(None);
            }
            len = self.fill(header.as_mut_bytes())?;
        }
        let bytes = &header.as_bytes()[..len];
        let is_whole = len == BLOCK_BYTES;
        let is_behind_end = start > end;
        match len {
            0 if start == 0 => Err(io::Error::other("it is no tar: it has no bytes")),
            0 => Ok(None),
            _ if is_behind_end && bytes.iter().all(|&byte| byte == 0) => Ok(None),
            _ if is_whole && header.cksum().is_ok_and(|sum| sum == checksum(bytes)) => {
                self.end = self.at;
                Ok(Some(header))
            }
            _ if is_behind_end => Err(io::Error::other(format!("what follows its end, at byte {start}, is no tar"))),
            _ if start == 0 => {
                let shown = bytes[..len.min(SHOWN_BYTES)].trim_ascii_end().escape_ascii();
                let what = if is_whole { "it is no tar" } else { "it is no tar, or breaks off within the first header" };
                Err(io::Error::other(format!("{what}: it begins with `{shown}`")))
            }
            _ if is_whole => Err(self.damaged("its checksum is wrong")),
            _ => Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("it breaks off within the header at byte {start}"))),
        }
    }

    fn member(&mut self, header: &Header, size: u64, long_name: Option<Vec<u8>>, pax: Option<&[u8]>) -> io::Result<Member> {
        let kind = header.entry_type();
        if kind.is_gnu_sparse() && header.as_gnu().is_some_and(|gnu| gnu.is_extended()) {
            self.skip_map()?;
        }
        // A size beyond what the header holds; where both are there, this one counts for every reader.
        let size = pax.and_then(|pax| pax_value(pax, "size")).and_then(|size| std::str::from_utf8(size).ok()?.parse().ok()).unwrap_or(size);
        self.begin(size)?;
        // Of a sparse member the header holds a name that nobody gave it.
        let path = pax.and_then(|pax| pax_value(pax, "GNU.sparse.name").or_else(|| pax_value(pax, "path")));
        let name = match (long_name, path) {
            (Some(mut name), _) => {
                name.pop_if(|last| *last == 0);
                name
            }
            (None, Some(path)) => path.to_vec(),
            (None, None) => header.path_bytes().into_owned(),
        };
        // The header of one that is described like this says that it is an ordinary file; where its parts belong may lie among its bytes.
        let kind = if pax.is_some_and(is_sparse) { EntryType::GNUSparse } else { kind };
        Ok(Member { name, kind, size })
    }

    /// Passes over the blocks that say where the parts of a sparse member lie, which its size does not count.
    fn skip_map(&mut self) -> io::Result<()> {
        let mut map = GnuExtSparseHeader::new();
        loop {
            if self.fill(map.as_mut_bytes())? < BLOCK_BYTES {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it breaks off within a sparse member"));
            }
            if !map.is_extended() {
                return Ok(());
            }
        }
    }

    /// Begins a member of this size here.
    fn begin(&mut self, size: u64) -> io::Result<()> {
        let is_too_much = || self.damaged(&format!("it claims {size} bytes"));
        // The padding must fit, too.
        self.end =
            self.at.checked_add(size).filter(|end| end.checked_next_multiple_of(BLOCK_BYTES as u64).is_some()).ok_or_else(is_too_much)?;
        Ok(())
    }

    /// Reads a member that describes the next one.
    fn description(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_DESCRIPTION_BYTES {
            return Err(self.damaged(&format!("a member's name or attributes of {size} bytes, more than {MAX_DESCRIPTION_BYTES}")));
        }
        self.begin(size)?;
        self.read()
    }

    /// Passes over what is left of the current member, with its padding.
    fn skip(&mut self) -> io::Result<()> {
        let left = self.end.next_multiple_of(BLOCK_BYTES as u64) - self.at;
        let skipped = io::copy(&mut self.tar.by_ref().take(left), &mut io::sink())?;
        self.at += skipped;
        if skipped < left {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, format!("it breaks off within a member, at byte {}", self.at)));
        }
        Ok(())
    }

    /// Reads until the buffer is full or the tar ends.
    fn fill(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut len = 0;
        while len < buf.len() {
            match self.tar.read(&mut buf[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.at += len as u64;
        self.end = self.at;
        Ok(len)
    }

    /// What is wrong with the header that was read last.
    fn damaged(&self, what: &str) -> io::Error {
        io::Error::other(format!("the header at byte {} is damaged: {what}", self.at - BLOCK_BYTES as u64))
    }
}

/// A header's checksum counts its own field as spaces.
fn checksum(header: &[u8]) -> u32 {
    let sum = |bytes: &[u8]| bytes.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    sum(&header[..148]) + 8 * u32::from(b' ') + sum(&header[156..])
}

/// The value of a key in a member's extended header.
fn pax_value<'a>(pax: &'a [u8], key: &str) -> Option<&'a [u8]> {
    PaxExtensions::new(pax).flatten().find(|extension| extension.key_bytes() == key.as_bytes()).map(|extension| extension.value_bytes())
}

/// Whether a member's extended header says that it is sparse, in any of GNU's three ways.
fn is_sparse(pax: &[u8]) -> bool {
    PaxExtensions::new(pax).flatten().any(|extension| extension.key_bytes().starts_with(b"GNU.sparse."))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::tar_of;

    /// A member's name, kind and bytes.
    type Whole = (Vec<u8>, EntryType, Vec<u8>);

    /// Every member, and how the tar ended.
    fn read_all(tar: &[u8]) -> (Vec<Whole>, io::Result<()>) {
        let (mut members, mut all) = (Members::new(tar), Vec::new());
        let mut read = || -> io::Result<()> {
            while let Some(Member { name, kind, size }) = members.advance()? {
                let bytes = members.read()?;
                assert_eq!(bytes.len() as u64, size);
                all.push((name, kind, bytes));
            }
            Ok(())
        };
        let end = read();
        (all, end)
    }

    /// The same by the library.
    fn read_by_library(tar: &[u8]) -> Vec<Whole> {
        let mut archive = tar::Archive::new(tar);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            (entry.path_bytes().into_owned(), entry.header().entry_type(), bytes)
        });
        entries.collect()
    }

    fn header(kind: EntryType, name: &str, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_path(name).unwrap();
        header.set_cksum();
        header
    }

    #[test]
    fn descriptions_of_any_claimed_size_take_no_memory() {
        for kind in [EntryType::GNULongName, EntryType::XHeader] {
            // Bytes without end: whoever reads on dies of it.
            let tar = io::Cursor::new(*header(kind, "x", 1 << 40).as_bytes()).chain(io::repeat(b'a'));
            let error = Members::new(tar).advance().unwrap_err().to_string();
            assert!(error.contains("of 1099511627776 bytes, more than 1048576"), "{error}");
        }
        let tar = [&header(EntryType::Regular, "x", u64::MAX - 700).as_bytes()[..], &[0; 1024]].concat();
        assert!(read_all(&tar).1.unwrap_err().to_string().ends_with("it claims 18446744073709550915 bytes"));
    }

    #[test]
    fn what_is_no_tar_is_called_so_and_shown_in_part() {
        let words = |bytes: &[u8]| read_all(bytes).1.unwrap_err().to_string();
        let page = format!("<!DOCTYPE html>\n<html>{}", " ".repeat(600));
        assert_eq!(words(page.as_bytes()), "it is no tar: it begins with `<!DOCTYPE html>\\n<html>`");
        assert_eq!(words(b"\x1b[2J\xff"), "it is no tar, or breaks off within the first header: it begins with `\\x1b[2J\\xff`");
        assert_eq!(words(b""), "it is no tar: it has no bytes");
        let mut tar = tar_of(&[("a", b"1"), ("b", b"2")]);
        tar[1024 + 125] = 0xff;
        assert_eq!(words(&tar), "the header at byte 1024 is damaged: its checksum is wrong");
        let mut binary = header(EntryType::Regular, "x", 0);
        binary.as_old_mut().size = [0x7f; 12];
        binary.set_cksum();
        assert_eq!(words(binary.as_bytes()), "the header at byte 0 is damaged: it has no size");
    }

    #[test]
    fn members_are_those_that_the_library_reads() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |kind: EntryType, name: &str, bytes: &[u8]| {
            let mut header = header(kind, "x", bytes.len() as u64);
            builder.append_data(&mut header, name, bytes).unwrap();
        };
        add(EntryType::Regular, "a.jpg", &[7; 1000]);
        add(EntryType::Directory, "b/", b"");
        add(EntryType::Regular, &"long/".repeat(50), &[8; 512]);
        add(EntryType::Continuous, "empty", b"");
        builder.append_pax_extensions([("comment", &b"x"[..]), ("path", "红.json".as_bytes())]).unwrap();
        builder.append(&header(EntryType::Regular, "short", 2), &b"{}"[..]).unwrap();
        builder.append_pax_extensions([("size", &b"3"[..])]).unwrap();
        builder.append(&header(EntryType::Regular, "sized", 0), &b"xyz"[..]).unwrap();
        let mut ustar = Header::new_ustar();
        ustar.set_path(format!("{}/{}", "p".repeat(120), "q".repeat(90))).unwrap();
        ustar.set_size(1);
        ustar.set_cksum();
        builder.append(&ustar, &b"u"[..]).unwrap();
        let mut link = header(EntryType::Symlink, "x", 0);
        builder.append_link(&mut link, "link", "to/".repeat(60)).unwrap();
        builder.append(&header(EntryType::Regular, "last", 1), &b"z"[..]).unwrap();
        let tar = builder.into_inner().unwrap();
        let (members, end) = read_all(&tar);
        assert!(end.is_ok() && members.len() == 9);
        assert_eq!(members, read_by_library(&tar));
    }

    #[test]
    fn joined_tars_are_read_to_the_end_of_the_last() {
        let (first, second) = (tar_of(&[("a", b"1"), ("b", b"2")]), tar_of(&[("c", b"3")]));
        let names = |tar: &[u8]| read_all(tar).0.into_iter().map(|(name, _, _)| String::from_utf8(name).unwrap()).collect::<Vec<_>>();
        let error = |tar: &[u8]| read_all(tar).1.unwrap_err().to_string();
        let padding = vec![0; 10_240];
        let joined = [&first[..], &padding, &second, &padding].concat();
        assert_eq!(names(&joined), ["a", "b", "c"]);
        assert!(read_all(&joined).1.is_ok());
        assert!(read_all(&[&first[..], &[0; 700]].concat()).1.is_ok(), "some zeros, and not a whole block");

        let trailer = [&first[..], b"and a trailer"].concat();
        assert_eq!((names(&trailer).len(), error(&trailer)), (2, format!("what follows its end, at byte {}, is no tar", first.len())));
        // A file that was made larger than its tar is not read to its end.
        let far = [&first[..], &vec![0; 2 << 20], &second].concat();
        assert_eq!(names(&far), ["a", "b"]);
        assert!(read_all(&far).1.is_ok());
        // The name that is given in a tar is no other tar's member's.
        let name = [header(EntryType::GNULongName, "x", 4).as_bytes(), &b"name"[..], &[0; 508]].concat();
        let described = [&name[..], &[0; 1024], &second].concat();
        assert_eq!(error(&described), "it breaks off between a member's name and the member");
    }

    #[test]
    fn sparse_members_of_an_extended_header_have_their_own_name() {
        let mut builder = tar::Builder::new(Vec::new());
        let records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "a.jpg"), ("GNU.sparse.realsize", "4")];
        builder.append_pax_extensions(records.map(|(key, value)| (key, value.as_bytes()))).unwrap();
        builder.append(&header(EntryType::Regular, "GNUSparseFile.1/a.jpg", 512), &[7; 512][..]).unwrap();
        builder.append(&header(EntryType::Regular, "b.jpg", 1), &b"1"[..]).unwrap();
        let (members, end) = read_all(&builder.into_inner().unwrap());
        assert!(end.is_ok());
        let found: Vec<_> = members.iter().map(|(name, kind, _)| (&name[..], kind.is_gnu_sparse())).collect();
        assert_eq!(found, [(&b"a.jpg"[..], true), (b"b.jpg", false)]);
    }

    #[test]
    fn sparse_member_with_a_map_of_its_own_is_passed_over() {
        let mut sparse = header(EntryType::GNUSparse, "a.jpg", 512);
        sparse.as_gnu_mut().unwrap().isextended[0] = 1;
        sparse.set_cksum();
        let mut first = GnuExtSparseHeader::new();
        first.isextended[0] = 1;
        let maps = [*first.as_bytes(), *GnuExtSparseHeader::new().as_bytes()].concat();
        let tar = [&sparse.as_bytes()[..], &maps, &[9; 512], &tar_of(&[("b.jpg", b"1")])].concat();
        let (members, end) = read_all(&tar);
        assert!(end.is_ok());
        assert_eq!(
            members.iter().map(|(name, _, bytes)| (&name[..], bytes.len())).collect::<Vec<_>>(),
            [(&b"a.jpg"[..], 512), (b"b.jpg", 1)]
        );
    }

    proptest! {
        #[test]
        fn any_tar_of_files_is_read_as_by_the_library(
            files in proptest::collection::vec(("[a-z红/.]{1,200}", proptest::collection::vec(any::<u8>(), 0..1500)), 0..8)
        ) {
            let mut builder = tar::Builder::new(Vec::new());
            for (name, bytes) in &files {
                let mut header = header(EntryType::Regular, "x", bytes.len() as u64);
                // Names that lead out of a folder are refused.
                let _ = builder.append_data(&mut header, name.trim_matches(['/', '.']), &bytes[..]);
            }
            let tar = builder.into_inner().unwrap();
            prop_assert_eq!(read_all(&tar).0, read_by_library(&tar));
        }
    }
}
