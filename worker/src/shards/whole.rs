//! A tar that is there whole or not at all.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Longest name that a header holds; a longer one gets a member of its own before it.
const MAX_HEADER_NAME: usize = 99;

/// A tar that is being written, under a name that no pattern matches until it is whole. One that is dropped before leaves a file that the
/// next attempt writes anew.
pub struct WholeTar {
    tar: tar::Builder<BufWriter<File>>,
    partial: PathBuf,
    target: PathBuf,
    num_bytes: u64,
}

impl WholeTar {
    /// Begins the tar that will be `target`; makes its folder.
    ///
    /// # Errors
    /// One line: the file cannot be made, or another process is writing it.
    pub fn begin(target: PathBuf) -> Result<Self, String> {
        let folder = folder(&target);
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let partial = folder.join(format!(".{name}.partial"));
        let create = || {
            std::fs::create_dir_all(folder)?;
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&partial)?;
            let in_work = || io::Error::new(io::ErrorKind::ResourceBusy, "another process is writing it");
            // Where a file system has no locks there is none to respect.
            if let Err(TryLockError::WouldBlock) = file.try_lock() {
                return Err(in_work());
            }
            // The lock may be on a file that its writer has renamed meanwhile.
            if std::fs::metadata(&partial).map(|named| named.ino()).ok() != Some(file.metadata()?.ino()) {
                return Err(in_work());
            }
            file.set_len(0)?;
            Ok(file)
        };
        let file = create().map_err(|error| format!("create {}: {error}", partial.display()))?;
        Ok(Self { tar: tar::Builder::new(BufWriter::new(file)), partial, target, num_bytes: 0 })
    }

    /// Bytes of the members so far.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Adds a member. The name goes in as it is: keys of other tars may be of any kind.
    ///
    /// # Errors
    /// The one line that names the file.
    pub fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), String> {
        self.num_bytes += bytes.len() as u64;
        let mut append = || {
            if name.len() > MAX_HEADER_NAME {
                // GNU's way: a member of another type that holds the name of the next.
                let mut long = tar::Header::new_gnu();
                long.set_entry_type(tar::EntryType::GNULongName);
                self.append_raw(long, b"././@LongLink", &[name.as_bytes(), b"\0"].concat())?;
            }
            let short = &name.as_bytes()[..name.len().min(MAX_HEADER_NAME)];
            self.append_raw(tar::Header::new_ustar(), short, bytes)
        };
        append().map_err(|error| format!("write {}: {error}", self.partial.display()))
    }

    fn append_raw(&mut self, mut header: tar::Header, name: &[u8], bytes: &[u8]) -> io::Result<()> {
        // Nothing of the time, the user or the machine.
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        self.tar.append(&header, bytes)
    }

    /// Makes it whole: from here on it is there under its name, also after a loss of power.
    ///
    /// # Errors
    /// The one line that names the file; nothing is overwritten.
    pub fn finish(self) -> Result<(), String> {
        let target = self.target.clone();
        self.publish().map_err(|error| format!("write {}: {error}", target.display()))
    }

    fn publish(self) -> io::Result<()> {
        let mut file = self.tar.into_inner()?;
        file.flush()?;
        file.get_ref().sync_all()?;
        if self.target.exists() {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "it exists; nothing is overwritten"));
        }
        std::fs::rename(&self.partial, &self.target)?;
        File::open(folder(&self.target))?.sync_all()
    }
}

fn folder(target: &Path) -> &Path {
    target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use peapod_data::shard::{Found, read_shard};
    use peapod_proto::ids::Bitmap;

    use super::*;

    #[test]
    fn keys_of_any_kind_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("made/0.tar");
        let keys = ["a", "../b", "/c/d", "./e", &"f".repeat(92), &"g".repeat(95), &format!("{}/h", "folder/".repeat(60)), "红"];
        let mut tar = WholeTar::begin(target.clone()).unwrap();
        for key in keys {
            tar.append(&format!("{key}.json"), key.as_bytes()).unwrap();
        }
        assert!(!target.exists());
        tar.finish().unwrap();
        let mut found = Vec::new();
        let end = read_shard(File::open(&target).unwrap(), &Bitmap::default(), |sample| {
            let Found::Sample(sample) = sample else { panic!("a stamp") };
            assert_eq!(sample.json.as_deref(), Some(sample.key.as_bytes()));
            found.push(sample.key);
            ControlFlow::Continue(())
        });
        assert_eq!((found, end.unwrap().truncated), (keys.map(str::to_owned).to_vec(), None));
        assert_eq!(std::fs::read_dir(folder.path().join("made")).unwrap().count(), 1);
    }

    #[test]
    fn a_tar_is_written_by_one_at_a_time_and_never_over_another() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("0.tar");
        let mut first = WholeTar::begin(target.clone()).unwrap();
        let refused = WholeTar::begin(target.clone()).err().unwrap();
        assert!(refused.starts_with("create ") && refused.ends_with("another process is writing it"), "{refused}");
        first.append("a.json", b"{}").unwrap();
        drop(first);
        let second = WholeTar::begin(target.clone()).unwrap();
        std::fs::write(&target, b"other").unwrap();
        assert!(second.finish().unwrap_err().ends_with("nothing is overwritten"));
        assert_eq!(std::fs::read(&target).unwrap(), b"other");
    }
}
