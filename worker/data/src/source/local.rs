//! Reading files of this host: disks, and what is mounted from other machines.
//!
//! A read that fails says nothing of the file. It is tried again at the same byte as one over a network is, and in the end given up by
//! name: what could not be read is not lost.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use super::patience::{Failing, Patience};
use super::remote::{CANCEL_POLL, Failure, IsCancelled};
use super::{Halt, SourceOptions, shown_url};
use crate::{Error, Result};

/// What tells one version of a file from another.
type Version = (u64, Option<SystemTime>);

/// Opens a file anew, and says which version of it is there.
type Open<'a, F> = Box<dyn FnMut() -> io::Result<(F, Version)> + Send + 'a>;

/// A file that is read from its start to its end.
pub struct LocalReader<'a, F = File> {
    patience: Patience,
    open: Open<'a, F>,
    /// None after a read has failed.
    file: Option<F>,
    version: Version,
    /// The next byte.
    at: u64,
    failing: Option<Failing>,
    is_cancelled: IsCancelled<'a>,
    halt: Halt,
}

/// Opens a file.
///
/// Errors: [`Error::Open`] if there is none; [`Error::Store`] if that cannot be told; [`Error::Cancelled`].
pub fn open<'a>(url: &str, path: &str, options: &SourceOptions, is_cancelled: IsCancelled<'a>, halt: &Halt) -> Result<LocalReader<'a>> {
    let path = PathBuf::from(path);
    LocalReader::begin(url, Box::new(move || versioned(&path)), options, is_cancelled, halt)
}

fn versioned(path: &Path) -> io::Result<(File, Version)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    Ok((file, (metadata.len(), metadata.modified().ok())))
}

impl<'a> LocalReader<'a> {
    /// Reads a file that is open already, from its start; `path`, whose name says what it holds, is opened again if a read fails.
    pub fn of(file: File, path: PathBuf, url: &str, options: &SourceOptions, is_cancelled: IsCancelled<'a>, halt: &Halt) -> Result<Self> {
        let mut first = Some(file);
        let open = move || {
            let file = first.take().map_or_else(|| File::open(&path), Ok)?;
            // Others who use it change its time.
            let len = file.metadata()?.len();
            Ok((file, (len, None)))
        };
        Self::begin(url, Box::new(open), options, is_cancelled, halt)
    }
}

impl<'a, F: Read + Seek> LocalReader<'a, F> {
    fn begin(url: &str, mut open: Open<'a, F>, options: &SourceOptions, is_cancelled: IsCancelled<'a>, halt: &Halt) -> Result<Self> {
        let patience = Patience { url: url.into(), options: options.clone(), warned: Mutex::new(None) };
        let mut failing = None;
        let (file, version) = loop {
            match open() {
                Ok(opened) => break opened,
                Err(error) if is_missing(&error) => return Err(Error::Open { url: url.into(), source: error }),
                Err(error) => hold_out(&patience, &mut failing, &error, &is_cancelled).map_err(|failure| failure.into_error(url))?,
            }
        };
        Ok(Self { patience, open, file: Some(file), version, at: 0, failing: None, is_cancelled, halt: halt.clone() })
    }

    /// Some bytes, from a file that is opened anew if it has to be.
    fn attempt(&mut self, buf: &mut [u8]) -> Result<io::Result<usize>, Failure> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => match (self.open)() {
                Ok((_, version)) if version != self.version => return Err(Failure::Changed),
                Ok((mut file, _)) => match file.seek(SeekFrom::Start(self.at)) {
                    Ok(_) => file,
                    Err(error) => return Ok(Err(error)),
                },
                Err(error) => return Ok(Err(error)),
            },
        };
        let read = file.read(buf);
        if read.as_ref().err().is_none_or(|error| error.kind() == io::ErrorKind::Interrupted) {
            self.file = Some(file);
        }
        Ok(read)
    }

    fn try_until_it_is_over(&mut self, buf: &mut [u8]) -> Result<io::Result<usize>, Failure> {
        loop {
            match self.attempt(buf)? {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    hold_out(&self.patience, &mut self.failing, &error, &self.is_cancelled)?;
                }
                read => return Ok(read),
            }
        }
    }
}

impl<F: Read + Seek> Read for LocalReader<'_, F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        // Whoever reads on behind a failure meets it again.
        if self.halt.is_set() {
            return Err(io::Error::other(format!("read {}: given up", shown_url(&self.patience.url))));
        }
        match self.try_until_it_is_over(buf) {
            Ok(read) => {
                let len = read?;
                self.at += len as u64;
                self.failing = None;
                Ok(len)
            }
            Err(failure) => {
                let error = failure.into_error(&self.patience.url);
                let text = error.to_string();
                self.halt.stop(&self.patience.url, error);
                Err(io::Error::other(text))
            }
        }
    }
}

/// Whether an error says that there is no such file, rather than that it cannot be had.
pub fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

/// Waits before the next attempt.
///
/// Errors: [`Failure::Lasting`] when it has been long enough, or no time will help; [`Failure::Cancelled`].
fn hold_out(patience: &Patience, failing: &mut Option<Failing>, error: &io::Error, is_cancelled: &IsCancelled<'_>) -> Result<(), Failure> {
    use io::ErrorKind::{InvalidFilename, InvalidInput, IsADirectory, NotFound, PermissionDenied};
    let (advice, is_lasting) = match error.kind() {
        PermissionDenied => ("every worker's user must be able to read it", true),
        IsADirectory => ("this is a folder: name the tars in it", true),
        InvalidFilename | InvalidInput => ("no file has such a name", true),
        // It was there when it was begun: a mount may come back.
        NotFound => ("it was removed while it was read", false),
        _ if is_out_of_files(error) => ("this process may open no more files: see `ulimit -n`", false),
        _ => ("look at the disk or the mount that it is on", false),
    };
    let reason = format!("{error}; {advice}");
    if is_lasting {
        return Err(Failure::Lasting(reason));
    }
    let until = Instant::now() + patience.next_pause(failing, &reason)?;
    loop {
        if is_cancelled() {
            return Err(Failure::Cancelled);
        }
        let left = until.saturating_duration_since(Instant::now());
        if left == Duration::ZERO {
            return Ok(());
        }
        std::thread::sleep(left.min(CANCEL_POLL));
    }
}

fn is_out_of_files(error: &io::Error) -> bool {
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    matches!(error.raw_os_error(), Some(ENFILE | EMFILE))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::io::Cursor;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::StoreError;

    const EIO: i32 = 5;
    const EACCES: i32 = 13;
    const EMFILE: i32 = 24;
    const ESTALE: i32 = 116;

    /// A file that gives some bytes and then fails, unless nothing is left of its troubles.
    struct Troubled {
        inner: Cursor<Vec<u8>>,
        fails_at: Option<(u64, i32)>,
    }

    impl Read for Troubled {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let most = match self.fails_at {
                Some((at, code)) if self.inner.position() >= at => return Err(io::Error::from_raw_os_error(code)),
                Some((at, _)) => (at - self.inner.position()) as usize,
                None => buf.len(),
            };
            let len = buf.len().min(most);
            self.inner.read(&mut buf[..len])
        }
    }

    impl Seek for Troubled {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.inner.seek(to)
        }
    }

    /// How opening goes: an error, or a file and where it fails.
    type Attempt = Result<Option<(u64, i32)>, i32>;

    fn options() -> SourceOptions {
        SourceOptions { retries: 3, first_pause: Duration::from_millis(1), ..SourceOptions::default() }
    }

    fn content() -> Vec<u8> {
        (0..10_000_u32).map(|at| (at / 7) as u8).collect()
    }

    /// Reads a file that has these troubles one after the other, and none behind them.
    fn read(troubles: &[Attempt], options: &SourceOptions) -> Result<Vec<u8>> {
        let mut troubles: VecDeque<Attempt> = troubles.iter().copied().collect();
        let open = move || match troubles.pop_front().unwrap_or(Ok(None)) {
            Err(code) => Err(io::Error::from_raw_os_error(code)),
            Ok(fails_at) => Ok((Troubled { inner: Cursor::new(content()), fails_at }, (10_000, None))),
        };
        let halt = Halt::default();
        let mut reader = LocalReader::begin("/nfs/0.tar", Box::new(open), options, Box::new(|| false), &halt)?;
        let mut all = Vec::new();
        let read = reader.read_to_end(&mut all);
        halt.check()?;
        read.unwrap();
        Ok(all)
    }

    fn refusal(troubles: &[Attempt]) -> String {
        match read(troubles, &options()) {
            Err(Error::Store(StoreError { url, reason, .. })) if url == "/nfs/0.tar" => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn failed_reads_go_on_at_the_same_byte() {
        let troubles =
            [Err(EMFILE), Ok(Some((0, ESTALE))), Ok(Some((5000, EIO))), Err(ESTALE), Ok(Some((5000, EIO))), Ok(Some((9999, EIO)))];
        assert!(read(&troubles, &options()).unwrap() == content());
    }

    #[test]
    fn what_goes_on_failing_is_given_up_with_the_path_the_reason_and_what_to_do() {
        let reason = refusal(&[Err(EIO); 9]);
        assert!(
            reason.starts_with("Input/output error (os error 5); look at the disk or the mount that it is on; given up after 4 attempts"),
            "{reason}"
        );
        let reason = refusal(&[[Ok(Some((100, ESTALE)))].as_slice(), &[Err(EMFILE); 9]].concat());
        assert!(reason.contains("see `ulimit -n`; given up after"), "{reason}");
        // No time will help.
        assert_eq!(refusal(&[Err(EACCES)]), "Permission denied (os error 13); every worker's user must be able to read it");
        assert!(matches!(read(&[Err(2)], &options()), Err(Error::Open { .. })), "a file that is not there is no failure");
    }

    #[test]
    fn file_that_is_another_when_it_is_opened_again_is_refused() {
        let mut sizes = [10_000, 10_001].into_iter();
        let open = move || Ok((Troubled { inner: Cursor::new(content()), fails_at: Some((10, EIO)) }, (sizes.next().unwrap(), None)));
        let halt = Halt::default();
        let mut reader = LocalReader::begin("0.tar", Box::new(open), &options(), Box::new(|| false), &halt).unwrap();
        assert!(reader.read_to_end(&mut Vec::new()).is_err());
        assert!(halt.check().unwrap_err().to_string().contains("it was changed while it was read"));
    }

    #[test]
    fn waiting_for_a_file_can_be_cancelled() {
        let is_cancelled = Arc::new(AtomicBool::new(false));
        let asked = is_cancelled.clone();
        let patient = SourceOptions { give_up_after: Duration::from_secs(600), ..options() };
        let open = || Err::<(Troubled, Version), _>(io::Error::from_raw_os_error(EIO));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(100));
                is_cancelled.store(true, Ordering::Release);
            });
            let cancelled = Box::new(move || asked.load(Ordering::Acquire));
            let opened = LocalReader::begin("0.tar", Box::new(open), &patient, cancelled, &Halt::default());
            assert!(matches!(opened.err().unwrap(), Error::Cancelled));
        });
    }
}
