//! An object's bytes in order, by however many answers they come.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::timeout;

use super::patience::{Failing, Patience};
use super::remote::{Failure, Identity, Object};

/// The bytes of an object from one place to another, in order, by however many answers they come.
pub struct Pieces {
    pub object: Arc<Object>,
    pub patience: Arc<Patience>,
    pub identity: Identity,
    /// The next byte.
    pub at: u64,
    /// Behind the last byte; `None`: where the body ends.
    pub end: Option<u64>,
    pub in_parts: bool,
    pub answer: Option<OpenAnswer>,
    pub failing: Option<Failing>,
}

/// An answer that is being read.
pub struct OpenAnswer {
    body: BoxStream<'static, Result<Bytes, Failure>>,
    /// Where its next byte lies.
    position: u64,
    /// Behind its last byte, as far as the server says.
    end: Option<u64>,
    /// The byte that it was asked for.
    wanted: u64,
}

impl Pieces {
    /// Waits for the first answer; returns which version it is of and whether parts are to be had.
    pub async fn begin(&mut self) -> Result<(Identity, bool), Failure> {
        loop {
            match self.connect().await {
                Err(Failure::Passing(reason)) => self.patience.hold_out(&mut self.failing, &reason).await?,
                answer => return answer,
            }
        }
    }

    /// The next bytes; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        while self.end.is_none_or(|end| self.at < end) {
            match self.attempt().await {
                Ok(None) => break,
                Ok(Some(piece)) if piece.is_empty() => {}
                Ok(Some(piece)) => {
                    self.at += piece.len() as u64;
                    self.failing = None;
                    return Ok(Some(piece));
                }
                Err(Failure::Passing(reason)) => {
                    self.answer = None;
                    self.patience.hold_out(&mut self.failing, &reason).await?;
                }
                Err(failure) => return Err(failure),
            }
        }
        Ok(None)
    }

    /// The next bytes of the open answer, less those that are known already: that can leave none.
    async fn attempt(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.answer.is_none() {
            self.connect().await?;
        }
        let Some(answer) = &mut self.answer else { return Err(Failure::Passing("no answer".into())) };
        let deadline = self.patience.options.read_timeout;
        let next = timeout(deadline, answer.body.next()).await;
        let next = next.map_err(|_| Failure::Passing(format!("no bytes came for {deadline:?} at byte {}", self.at)))?;
        match next {
            Some(piece) => {
                let mut piece = piece?;
                let known = self.at.saturating_sub(answer.position).min(piece.len() as u64);
                answer.position += piece.len() as u64;
                piece.advance(known as usize);
                if let Some(end) = self.end {
                    piece.truncate(usize::try_from(end - self.at).unwrap_or(usize::MAX));
                }
                Ok(Some(piece))
            }
            None if self.end.is_none() => Ok(None),
            // Less than was asked for, and all of what was promised: some servers have a limit, and are asked for the rest.
            None if answer.end == Some(answer.position) && self.at > answer.wanted => {
                self.answer = None;
                Ok(Some(Bytes::new()))
            }
            None => Err(Failure::Passing(format!("the answer breaks off at byte {}", self.at))),
        }
    }

    /// Asks for what is missing.
    async fn connect(&mut self) -> Result<(Identity, bool), Failure> {
        let range = self.end.filter(|_| self.in_parts).map(|end| self.at..end);
        let answer = within(self.patience.options.read_timeout, self.object.get(range, &self.identity)).await?;
        if self.identity.differs(&answer.identity) {
            return Err(Failure::Changed);
        }
        if answer.start > self.at {
            return Err(Failure::Lasting(format!("asked for byte {}, the server answers from byte {} on", self.at, answer.start)));
        }
        self.answer = Some(OpenAnswer { body: answer.body, position: answer.start, end: answer.end, wanted: self.at });
        Ok((answer.identity, answer.is_part))
    }
}

pub async fn within<T>(deadline: Duration, request: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(deadline, request).await.unwrap_or_else(|_| Err(Failure::Passing(format!("no answer within {deadline:?}"))))
}
