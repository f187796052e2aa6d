//! Which of a host's GPUs this worker takes, where nobody says so.
//!
//! A worker locks a file for its GPU, so that the next one on the host takes another, and one that was told to take the same is stopped
//! before it has loaded gigabytes. The system gives the lock back however the process ends. Workers that do not see each other's files, in
//! containers say, find out when they meet: a claim is a convenience.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

/// The right to a GPU, for as long as it lives; empty where claims cannot be kept.
#[derive(Debug)]
pub struct Claim {
    /// Locked.
    _file: Option<File>,
}

/// Where claims are kept: for all of a host's users, as GPUs are.
#[derive(Debug)]
pub struct Claims {
    folder: PathBuf,
}

impl Default for Claims {
    fn default() -> Self {
        Self { folder: std::env::temp_dir() }
    }
}

impl Claims {
    /// Claims the GPU with this UUID; `None` if another process has it.
    pub fn take(&self, uuid: [u8; 16]) -> Option<Claim> {
        let path = self.folder.join(format!("peapod-gpu-{}", u128::from_be_bytes(uuid)));
        let file = match open(&path) {
            Ok(file) => file,
            Err(error) => {
                tracing::debug!("{}: {error}: whether another worker has this GPU is not known", path.display());
                return Some(Claim { _file: None });
            }
        };
        match file.try_lock() {
            Ok(()) => Some(Claim { _file: Some(file) }),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Error(error)) => {
                tracing::debug!("lock {}: {error}: whether another worker has this GPU is not known", path.display());
                Some(Claim { _file: None })
            }
        }
    }

    /// Claims the first of `num_devices` GPUs that nobody has; returns its number. One that does not answer is passed over.
    ///
    /// # Errors
    /// `uuid_of`'s, if none is free and one did not answer.
    pub fn take_first(
        &self,
        num_devices: usize,
        uuid_of: impl Fn(usize) -> Result<[u8; 16], String>,
    ) -> Result<Option<(usize, Claim)>, String> {
        let mut first_error = None;
        for ordinal in 0..num_devices {
            match uuid_of(ordinal).map(|uuid| self.take(uuid)) {
                Ok(Some(claim)) => return Ok(Some((ordinal, claim))),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!("cuda:{ordinal} is passed over: {error}");
                    first_error.get_or_insert(error);
                }
            }
        }
        first_error.map_or(Ok(None), Err)
    }
}

/// Opens a file that any user may lock. One of another user's, in a folder that protects such, can still be locked when it is only read.
fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path).or_else(|_| File::open(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uuid_of(ordinal: usize) -> Result<[u8; 16], String> {
        Ok([ordinal as u8 + 1; 16])
    }

    #[test]
    fn each_worker_takes_the_first_gpu_that_is_free() {
        let folder = tempfile::tempdir().unwrap();
        let claims = Claims { folder: folder.path().to_owned() };
        let take = || claims.take_first(3, uuid_of).unwrap();
        let (first, claim) = take().unwrap();
        let (second, _second) = take().unwrap();
        let (third, _third) = take().unwrap();
        assert_eq!([first, second, third], [0, 1, 2]);
        assert!(take().is_none() && claims.take([1; 16]).is_none(), "all are taken");
        drop(claim);
        assert_eq!(take().unwrap().0, 0, "a worker that ended leaves its GPU");
        assert!(claims.take([9; 16]).is_some());
    }

    #[test]
    fn gpu_that_does_not_answer_is_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let claims = Claims { folder: folder.path().to_owned() };
        let uuid_of = |ordinal| if ordinal == 0 { Err("it has fallen off the bus".to_owned()) } else { uuid_of(ordinal) };
        let (ordinal, _claim) = claims.take_first(2, uuid_of).unwrap().unwrap();
        assert_eq!(ordinal, 1);
        assert_eq!(claims.take_first(2, uuid_of).unwrap_err(), "it has fallen off the bus");
    }

    #[test]
    fn claims_that_cannot_be_kept_stop_nobody() {
        let claims = Claims { folder: "/no/such/folder".into() };
        assert!(claims.take([1; 16]).is_some() && claims.take([1; 16]).is_some());
    }
}
