//! One shard: a tar whose consecutive members with the same key make a sample.

mod members;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::ops::ControlFlow;

use peapod_proto::ids::{Bitmap, SampleName};
use webdataset::core::utils::{base_plus_ext, is_shard_metadata};

use crate::cached;
use crate::sample::Rule;
use crate::words::shown;
use members::{Member, Members};

/// A member larger than this is not read: a picture or caption of this size is a mistake in the data.
pub const MAX_MEMBER_BYTES: u64 = 64 << 20;

/// A stamp of more bytes is none.
const MAX_STAMP_BYTES: u64 = 1 << 20;

/// A longer name is not used: no file system has one.
const MAX_NAME_BYTES: usize = 4096;

/// Extensions of pictures. Of several that a sample has the first one here is read: a `.png` beside a `.jpg` is a mask or the like.
const PICTURES: [&str; 3] = ["jpg", "jpeg", "png"];

/// Members of a sample that are remembered though they are not read.
const MAX_OTHERS: usize = 8;

/// One sample as it lies in the tar. What of it is usable is for [`sample`](crate::sample) to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawSample {
    /// Position among the tar's samples.
    pub index: u32,
    /// The members' common path, up to the first dot of the file name.
    pub key: String,
    /// The picture: the member `.jpg`, or without one `.jpeg`, or without that `.png`. What it is its bytes say.
    pub jpg: Option<Vec<u8>>,
    /// The member `.json`.
    pub json: Option<Vec<u8>>,
    /// The member with what was computed of it before; of a cached shard alone.
    pub latents: Option<Vec<u8>>,
    /// Extensions of the first few members that are not read.
    pub others: Vec<String>,
    /// Why the members cannot be used, if they cannot, and the same in words.
    pub fault: Option<(Rule, String)>,
}

/// What is found in a shard, in the order of the tar.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// The stamp of a [`cached`] shard: whoever reads on has checked it.
    Stamp(Vec<u8>),
    /// A sample.
    Sample(RawSample),
}

/// How a shard ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardEnd {
    /// Samples in the tar, those passed over included.
    pub num_samples: u32,
    /// Why reading broke off, if it did: what lies behind the break is lost.
    pub truncated: Option<String>,
}

/// Reads a tar to its end and gives each sample to `visit`, in order, except those marked in `done`; before those of a cached shard, its
/// stamp.
///
/// A sample is all consecutive members that share the path up to the first dot of the file name; files without an extension and names in
/// double underscores belong to none, nor do folders, links and devices. A key that comes back after other samples is a sample of its own,
/// and broken: its members belong to the first. A tar that breaks off gives what precedes the break.
///
/// Returns `None` if `visit` broke off.
pub fn read_shard(tar: impl Read, done: &Bitmap, mut visit: impl FnMut(Found) -> ControlFlow<()>) -> Option<ShardEnd> {
    let mut grouper = Grouper { done, is_cached: false, num_samples: 0, keys: HashSet::new(), current: None, picture: PICTURES.len() };
    let truncated = match read_members(&mut Members::new(tar), &mut grouper, &mut visit) {
        Ok(ControlFlow::Continue(())) => None,
        Ok(ControlFlow::Break(())) => return None,
        Err(error) => Some(shown(&error.to_string())),
    };
    // The sample before a break is whole unless a member was to follow: without its jpg or json it is reported as bad.
    if grouper.finish().map(Found::Sample).map(visit).is_some_and(|flow| flow.is_break()) {
        return None;
    }
    Some(ShardEnd { num_samples: grouper.num_samples, truncated })
}

fn read_members(
    members: &mut Members<impl Read>,
    grouper: &mut Grouper<'_>,
    visit: &mut impl FnMut(Found) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    while let Some(member) = members.advance()? {
        if !(member.kind.is_file() || member.kind.is_contiguous() || member.kind.is_gnu_sparse()) {
            continue;
        }
        let (name, problem) = readable_name(&member.name);
        if name == cached::STAMP && member.size <= MAX_STAMP_BYTES {
            grouper.is_cached = true;
            if visit(Found::Stamp(members.read()?)).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        if name == cached::TRUNCATED && grouper.is_cached && member.size <= MAX_STAMP_BYTES {
            return Err(io::Error::other(String::from_utf8_lossy(&members.read()?)));
        }
        if is_shard_metadata(&name) {
            continue;
        }
        let Some((key, extension)) = base_plus_ext(&name) else { continue };
        // The sample before this one is let go first: a break within this member must not cost it.
        if grouper.turn_to(key)?.map(Found::Sample).map(&mut *visit).is_some_and(|flow| flow.is_break()) {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(problem) = problem {
            grouper.fault(Rule::BadName, problem);
        }
        grouper.read(extension, &member, members)?;
    }
    Ok(ControlFlow::Continue(()))
}

/// A member's name as text, and what is wrong with it.
fn readable_name(name: &[u8]) -> (String, Option<String>) {
    match std::str::from_utf8(name) {
        Ok(name) if name.len() <= MAX_NAME_BYTES => (name.to_owned(), None),
        // Written out rather than replaced, so that two such names stay two.
        _ if name.len() <= MAX_NAME_BYTES => (name.escape_ascii().to_string(), Some("the name is not UTF-8".into())),
        _ => {
            // The extension is lost; the sample is broken either way and must not lose its place.
            let start = name[..64].escape_ascii();
            (format!("{start}~.long"), Some(format!("a name of {} bytes, more than {MAX_NAME_BYTES}", name.len())))
        }
    }
}

/// Puts members together into samples.
struct Grouper<'a> {
    done: &'a Bitmap,
    /// Whether a stamp was read.
    is_cached: bool,
    num_samples: u32,
    /// Every key so far, as a number: the names themselves would be most of what is held of a shard of small samples.
    keys: HashSet<u64>,
    current: Option<RawSample>,
    /// Which of [`PICTURES`] the current sample has; their number if none.
    picture: usize,
}

impl Grouper<'_> {
    /// Goes on with the sample `key`; returns the one that this brings to an end.
    fn turn_to(&mut self, key: &str) -> io::Result<Option<RawSample>> {
        if self.current.as_ref().is_some_and(|sample| sample.key == key) {
            return Ok(None);
        }
        if self.num_samples == SampleName::LIMIT {
            return Err(io::Error::other(format!("more than {} samples", SampleName::LIMIT)));
        }
        let finished = self.finish();
        // The same in every process. One of two keys with one number would be left out: of a million samples that is once in 10^7 shards.
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let fault = (!self.keys.insert(hasher.finish()))
            .then(|| (Rule::DuplicateKey, "this tar had the key before; a sample's members must follow each other".into()));
        let (index, key) = (self.num_samples, key.to_owned());
        self.current = Some(RawSample { index, key, jpg: None, json: None, latents: None, others: Vec::new(), fault });
        self.picture = PICTURES.len();
        self.num_samples += 1;
        Ok(finished)
    }

    /// Takes out the current sample, unless it is to be passed over.
    fn finish(&mut self) -> Option<RawSample> {
        self.current.take().filter(|sample| !self.done.contains(sample.index))
    }

    /// Notes what is wrong with the current sample, unless something was before.
    fn fault(&mut self, rule: Rule, words: String) {
        if let Some(sample) = &mut self.current {
            sample.fault.get_or_insert((rule, words));
        }
    }

    /// Reads a member of the current sample, if it is one that is used.
    fn read(&mut self, extension: &str, member: &Member, members: &mut Members<impl Read>) -> io::Result<()> {
        let is_wanted = |sample: &&mut RawSample| sample.fault.is_none() && !self.done.contains(sample.index);
        let Some(sample) = self.current.as_mut().filter(is_wanted) else { return Ok(()) };
        let lower = extension.to_ascii_lowercase();
        let picture = PICTURES.iter().position(|known| *known == lower);
        let slot = match lower.as_str() {
            "json" => &mut sample.json,
            _ if picture.is_some_and(|picture| picture < self.picture) => {
                self.picture = picture.unwrap_or_default();
                sample.jpg = None;
                &mut sample.jpg
            }
            _ if picture == Some(self.picture) => &mut sample.jpg,
            cached::LATENTS if self.is_cached => &mut sample.latents,
            // Beside a picture it is somebody else's.
            cached::LATENTS if sample.jpg.is_none() => {
                let words = format!(".{extension}, but the shard's stamp, {}, does not come before it", cached::STAMP);
                sample.fault = Some((Rule::BadCache, words));
                return Ok(());
            }
            cached::SKIPPED if self.is_cached && member.size <= MAX_STAMP_BYTES => {
                sample.fault = Some(cached::read_skipped(&members.read()?));
                return Ok(());
            }
            _ => {
                if sample.others.len() < MAX_OTHERS {
                    sample.others.push(extension.to_owned());
                }
                return Ok(());
            }
        };
        let size = member.size;
        if slot.is_some() {
            sample.fault = Some((Rule::DuplicateMember, format!("two members .{extension}")));
        } else if member.kind.is_gnu_sparse() {
            sample.fault = Some((Rule::Sparse, format!(".{extension} is a sparse file; write the tar without --sparse")));
        } else if size > MAX_MEMBER_BYTES {
            sample.fault = Some((Rule::HugeMember, format!(".{extension} has {size} bytes, more than {MAX_MEMBER_BYTES}")));
        } else {
            *slot = Some(members.read()?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::tar_of;

    fn read_all(tar: &[u8], done: &Bitmap) -> (Vec<RawSample>, ShardEnd) {
        let mut samples = Vec::new();
        let end = read_shard(tar, done, |found| {
            if let Found::Sample(sample) = found {
                samples.push(sample);
            }
            ControlFlow::Continue(())
        });
        (samples, end.unwrap())
    }

    fn keys(samples: &[RawSample]) -> Vec<(u32, &str)> {
        samples.iter().map(|sample| (sample.index, sample.key.as_str())).collect()
    }

    #[test]
    fn a_sample_is_all_members_that_share_the_path_up_to_the_first_dot() {
        let tar = tar_of(&[
            ("__index__", b"x"),
            ("dir.v1/a.jpg", b"A"),
            ("dir.v1/a.seg.png", b"-"),
            ("dir.v1/a.json", b"{}"),
            ("README", b"no extension"),
            ("dir.v1/b.JSON", b"[]"),
            ("c.jpg", b"C"),
            ("c.jpg", b"again"),
        ]);
        let (samples, end) = read_all(&tar, &Bitmap::default());
        assert_eq!(keys(&samples), [(0, "dir.v1/a"), (1, "dir.v1/b"), (2, "c")]);
        assert_eq!((samples[0].jpg.as_deref(), samples[0].json.as_deref()), (Some(&b"A"[..]), Some(&b"{}"[..])));
        assert_eq!((samples[1].jpg.as_deref(), samples[1].json.as_deref()), (None, Some(&b"[]"[..])));
        assert_eq!(samples[2].fault, Some((Rule::DuplicateMember, "two members .jpg".into())));
        assert_eq!(end, ShardEnd { num_samples: 3, truncated: None });
    }

    /// Adds a member with this header.
    fn add(tar: &mut tar::Builder<Vec<u8>>, kind: tar::EntryType, name: &str, bytes: &[u8]) {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, bytes).unwrap();
    }

    fn faults(tar: &[u8]) -> Vec<(String, Option<Rule>)> {
        let (samples, end) = read_all(tar, &Bitmap::default());
        assert_eq!(end, ShardEnd { num_samples: samples.len() as u32, truncated: None });
        samples.into_iter().map(|sample| (sample.key, sample.fault.map(|(rule, _)| rule))).collect()
    }

    #[test]
    fn a_key_that_comes_back_is_broken_and_the_first_one_is_not() {
        let tar = tar_of(&[("a.jpg", b"1"), ("a.json", b"{}"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.json", b"{}"), ("c.jpg", b"4")]);
        let duplicate = Some(Rule::DuplicateKey);
        assert_eq!(faults(&tar), [("a".into(), None), ("b".into(), None), ("a".into(), duplicate), ("c".into(), None)]);
        let (samples, _) = read_all(&tar, &Bitmap::default());
        assert_eq!((samples[0].jpg.as_deref(), samples[2].jpg.as_deref()), (Some(&b"1"[..]), None), "what is not used is not read");
        // A reader that passes over the first still knows its key.
        let mut done = Bitmap::default();
        done.insert(0);
        let (samples, _) = read_all(&tar, &done);
        assert_eq!((samples[1].index, samples[1].fault.as_ref().map(|(rule, _)| *rule)), (2, duplicate));
    }

    #[test]
    fn members_out_of_order_are_broken_samples_and_say_so() {
        let tar = tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}"), ("b.json", b"{}")]);
        let (samples, _) = read_all(&tar, &Bitmap::default());
        assert!(samples[0].json.is_none() && samples[1].json.is_none());
        assert!(samples[2..].iter().all(|sample| sample.fault.as_ref().unwrap().1.contains("members must follow each other")));
    }

    #[test]
    fn a_name_that_is_not_utf8_is_broken_and_stays_apart_from_others() {
        let mut tar = tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")]);
        for (header, byte) in [(0, 0xe9), (1024, 0xe8)] {
            tar[header] = byte;
            let mut fields = tar::Header::from_byte_slice(&tar[header..header + 512]).clone();
            fields.set_cksum();
            tar[header..header + 512].copy_from_slice(fields.as_bytes());
        }
        let bad = Some(Rule::BadName);
        assert_eq!(faults(&tar), [("\\xe9".into(), bad), ("\\xe8".into(), bad), ("c".into(), None)]);
    }

    #[test]
    fn long_names_of_either_kind_are_whole() {
        let long = format!("{}/{}", "folder".repeat(40), "k".repeat(300));
        let mut gnu = tar::Builder::new(Vec::new());
        add(&mut gnu, tar::EntryType::Regular, &format!("{long}.jpg"), b"1");
        add(&mut gnu, tar::EntryType::Regular, &format!("{long}.json"), b"{}");
        let mut pax = tar::Builder::new(Vec::new());
        for (extension, bytes) in [("jpg", &b"1"[..]), ("json", b"{}")] {
            let name = format!("{long}.{extension}");
            pax.append_pax_extensions([("path", name.as_bytes())]).unwrap();
            add(&mut pax, tar::EntryType::Regular, "short.name", bytes);
        }
        for tar in [gnu, pax] {
            let (samples, _) = read_all(&tar.into_inner().unwrap(), &Bitmap::default());
            assert!(samples.len() == 1 && samples[0].key == long && samples[0].jpg.is_some() && samples[0].json.is_some());
        }
        let mut endless = tar::Builder::new(Vec::new());
        add(&mut endless, tar::EntryType::Regular, &format!("{}.jpg", "x/".repeat(4000)), b"1");
        add(&mut endless, tar::EntryType::Regular, "b.jpg", b"1");
        let tar = endless.into_inner().unwrap();
        let faults = faults(&tar);
        assert!(faults[0].1 == Some(Rule::BadName) && faults[0].0.len() < 100 && faults[1] == ("b".into(), None), "{faults:?}");
    }

    #[test]
    fn folders_links_and_devices_belong_to_no_sample() {
        let mut tar = tar::Builder::new(Vec::new());
        add(&mut tar, tar::EntryType::Directory, "a.jpg/", b"");
        for kind in [tar::EntryType::Symlink, tar::EntryType::Link] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(0);
            tar.append_link(&mut header, "a.jpg", "/etc/passwd").unwrap();
        }
        add(&mut tar, tar::EntryType::Fifo, "a.jpg", b"");
        add(&mut tar, tar::EntryType::Regular, "a.json", b"{}");
        add(&mut tar, tar::EntryType::Continuous, "b.jpg", b"1");
        let (samples, _) = read_all(&tar.into_inner().unwrap(), &Bitmap::default());
        assert_eq!(keys(&samples), [(0, "a"), (1, "b")]);
        assert!(samples[0].jpg.is_none() && samples[0].json.is_some() && samples[0].fault.is_none(), "what a link points at is not read");
        assert!(samples[1].jpg.is_some());
    }

    #[test]
    fn sparse_members_are_broken() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNUSparse);
        header.set_path("a.jpg").unwrap();
        header.set_size(4);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.sparse[0].offset.copy_from_slice(b"00000000000\0");
        gnu.sparse[0].numbytes.copy_from_slice(b"00000000004\0");
        gnu.set_real_size(4);
        header.set_cksum();
        let mut tar = header.as_bytes().to_vec();
        tar.extend([b"1234".as_slice(), &[0; 508]].concat());
        tar.extend(tar_of(&[("b.jpg", b"1")]));
        assert_eq!(faults(&tar), [("a".into(), Some(Rule::Sparse)), ("b".into(), None)]);
    }

    #[test]
    fn done_samples_are_passed_over_but_counted() {
        let tar = tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")]);
        let mut done = Bitmap::default();
        done.insert(1);
        let (samples, end) = read_all(&tar, &done);
        assert_eq!(keys(&samples), [(0, "a"), (2, "c")]);
        assert_eq!(end.num_samples, 3);
    }

    #[test]
    fn a_tar_cut_off_anywhere_gives_the_samples_before_the_break() {
        let tar = tar_of(&[("a.jpg", &[7; 700]), ("a.json", b"{}"), ("b.jpg", &[8; 700]), ("b.json", b"{}")]);
        let (whole, _) = read_all(&tar, &Bitmap::default());
        // Where each sample's last member ends, without its padding.
        let ends = [512 + 1024 + 512 + 2, 2 * (512 + 1024) + 1024 + 512 + 2];
        for cut in 0..ends[1] {
            let (samples, end) = read_all(&tar[..cut], &Bitmap::default());
            let num_whole = ends.iter().filter(|&&end| cut >= end).count();
            assert_eq!(samples[..num_whole], whole[..num_whole], "cut at {cut}");
            assert_eq!(end.num_samples as usize, samples.len());
            // A tar without the blocks of zeros at its end is in use; one that ends between two members cannot be told from it.
            assert!(end.truncated.is_some() || cut % 512 == 0, "cut at {cut}");
        }
    }

    #[test]
    fn a_corrupt_header_ends_the_shard_with_its_reason() {
        let mut tar = tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")]);
        tar[1024 + 3] ^= 0xff;
        let (samples, end) = read_all(&tar, &Bitmap::default());
        assert_eq!(keys(&samples), [(0, "a")]);
        assert!(end.truncated.unwrap().contains("checksum") || end.num_samples == 1);
    }

    #[test]
    fn pictures_of_other_extensions_are_read_where_there_is_no_jpg() {
        let tar = tar_of(&[
            ("a.png", b"1"),
            ("b.JPEG", b"2"),
            ("b.txt", b"-"),
            ("c.png", b"mask"),
            ("c.jpg", b"3"),
            ("d.jpg", b"4"),
            ("d.jpeg", b"-"),
            ("d.png", b"mask"),
            ("e.png", b"5"),
            ("e.png", b"again"),
        ]);
        let (samples, _) = read_all(&tar, &Bitmap::default());
        let pictures: Vec<_> = samples.iter().map(|sample| sample.jpg.as_deref().unwrap()).collect();
        assert_eq!(pictures, [b"1", b"2", b"3", b"4", b"5"]);
        assert!(samples[..4].iter().all(|sample| sample.fault.is_none()));
        assert_eq!((&samples[1].others[..], &samples[3].others[..]), (&["txt".to_owned()][..], &["jpeg".to_owned(), "png".to_owned()][..]));
        assert_eq!(samples[4].fault, Some((Rule::DuplicateMember, "two members .png".into())));
    }

    #[test]
    fn a_visitor_may_break_off() {
        let tar = tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2")]);
        assert_eq!(read_shard(&tar[..], &Bitmap::default(), |_| ControlFlow::Break(())), None);
    }

    #[test]
    fn gzip_is_undone_when_a_shard_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard.tar.gz");
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2")])).unwrap();
        std::fs::write(&path, gzip.finish().unwrap()).unwrap();
        let end = read_shard(crate::source::open(path.to_str().unwrap()).unwrap(), &Bitmap::default(), |_| ControlFlow::Continue(()));
        assert_eq!(end, Some(ShardEnd { num_samples: 2, truncated: None }));
    }

    #[test]
    fn checksums_of_compressed_shards_are_compared_though_the_tar_ends_before_them() {
        let folder = tempfile::tempdir().unwrap();
        let tar = tar_of(&[("a.jpg", b"1"), ("b.jpg", b"2")]);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).unwrap();
        let zstd = ruzstd::encoding::compress_to_vec(&tar[..], ruzstd::encoding::CompressionLevel::Fastest);
        // The last eight bytes of gzip are a checksum and the size; the last four of zstd are a checksum.
        for (compressed, from_end) in [(gzip.finish().unwrap(), 8), (zstd, 1)] {
            let path = folder.path().join("shard");
            let read = |compressed: &[u8]| {
                std::fs::write(&path, compressed).unwrap();
                read_shard(crate::source::open(path.to_str().unwrap()).unwrap(), &Bitmap::default(), |_| ControlFlow::Continue(())).unwrap()
            };
            assert_eq!(read(&compressed), ShardEnd { num_samples: 2, truncated: None });
            let mut damaged = compressed.clone();
            damaged[compressed.len() - from_end] ^= 0xff;
            let end = read(&damaged);
            assert!(end.num_samples == 2 && end.truncated.is_some(), "{end:?}");
        }
    }

    #[test]
    fn a_cached_shard_gives_its_stamp_then_samples_and_why_others_are_not_trained() {
        let members: [(&str, &[u8]); 9] = [
            (cached::STAMP, b"stamp"),
            ("a.json", b"{}"),
            ("a.latents.safetensors", b"A"),
            ("b.skipped", b"too_small: 3 x 3"),
            ("c.json", b"{}"),
            ("c.skipped", b"bad_picture: jpg: no end"),
            ("a.skipped", b"duplicate_key: again"),
            ("d.latents.safetensors", b"D"),
            (cached::TRUNCATED, b"unexpected EOF"),
        ];
        let tar = tar_of(&members);
        let mut stamps = Vec::new();
        read_shard(&tar[..], &Bitmap::default(), |found| {
            match found {
                Found::Stamp(stamp) => stamps.push(stamp),
                Found::Sample(_) => assert_eq!(stamps.len(), 1, "the stamp comes first"),
            }
            ControlFlow::Continue(())
        });
        assert_eq!(stamps, [b"stamp"]);
        let (samples, end) = read_all(&tar, &Bitmap::default());
        assert_eq!(keys(&samples), [(0, "a"), (1, "b"), (2, "c"), (3, "a"), (4, "d")]);
        assert_eq!((samples[0].latents.as_deref(), samples[0].json.as_deref()), (Some(&b"A"[..]), Some(&b"{}"[..])));
        assert_eq!(samples[1].fault, Some((Rule::TooSmall, "3 x 3".into())));
        assert_eq!(samples[2].fault, Some((Rule::BadPicture, "jpg: no end".into())));
        assert_eq!(samples[3].fault.as_ref().map(|(rule, _)| *rule), Some(Rule::DuplicateKey));
        assert_eq!(end, ShardEnd { num_samples: 5, truncated: Some("unexpected EOF".into()) });
    }

    #[test]
    fn latents_without_a_stamp_before_them_are_broken_unless_a_picture_is_there() {
        let tar = tar_of(&[("a.latents.safetensors", b"A"), ("b.jpg", b"B"), ("b.latents.safetensors", b"B"), (cached::STAMP, b"s")]);
        let (samples, _) = read_all(&tar, &Bitmap::default());
        let (rule, words) = samples[0].fault.clone().unwrap();
        assert!(rule == Rule::BadCache && words.contains("stamp.json, does not come before it"), "{words}");
        assert!(samples[1].fault.is_none() && samples[1].jpg.is_some() && samples[1].latents.is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            read_all(&bytes, &Bitmap::default());
        }

        #[test]
        fn a_damaged_tar_comes_to_an_end(changes in proptest::collection::vec((0_usize..5120, any::<u8>()), 1..16)) {
            let mut tar = tar_of(&[("a.jpg", &[7; 700]), ("a.json", b"{}"), ("b.jpg", b"x"), ("b.json", b"{}")]);
            for (position, byte) in changes {
                if let Some(target) = tar.get_mut(position) {
                    *target = byte;
                }
            }
            let (samples, end) = read_all(&tar, &Bitmap::default());
            prop_assert_eq!(samples.len(), end.num_samples as usize);
        }
    }
}
