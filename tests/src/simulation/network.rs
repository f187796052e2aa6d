//! Streams between workers and the coordinator: in order within one, none between them, and any of them may break.

use std::time::Duration;

use peapod_coordinator::core::StreamId;
use peapod_proto::ids::WorkerId;
use peapod_proto::message::{FromWorker, ToWorker};

use super::queue::{Time, ms};
use super::{Event, ProcessId, World};

/// A stream by its place among all of a simulation.
pub type StreamKey = usize;

/// What travels to the coordinator.
#[derive(Debug)]
pub enum Up {
    /// A message.
    Message(FromWorker),
    /// The worker has closed its side, or the connection is broken.
    End(&'static str),
}

/// What travels to a worker.
#[derive(Debug)]
pub enum Down {
    /// The call is accepted.
    Joined,
    /// A message.
    Message(ToWorker),
    /// The coordinator has closed its side, or the connection is broken.
    End(&'static str),
}

/// One stream.
#[derive(Debug)]
pub struct Stream {
    /// Whose.
    pub process: ProcessId,
    /// With which start of the coordinator.
    pub term: u64,
    /// What that one calls it.
    pub id: StreamId,
    /// Whom that one takes the worker for.
    pub worker: Option<WorkerId>,
    up_at: Time,
    down_at: Time,
    /// Nothing arrives after this.
    up_cut: Option<Time>,
    down_cut: Option<Time>,
}

/// How long a side takes to see that the other's process is gone.
pub const SOON: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(60));
/// How long it may take to see that a connection is of no use any more.
pub const LATE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(6));

impl World {
    pub(super) fn open_stream(&mut self, process: ProcessId, term: u64, id: StreamId) -> StreamKey {
        let (up_at, down_at) = (self.now, self.now);
        self.streams.push(Stream { process, term, id, worker: None, up_at, down_at, up_cut: None, down_cut: None });
        self.streams.len() - 1
    }

    /// How long something takes over the network.
    pub(super) fn latency(&mut self) -> Duration {
        let usual = self.random.between(self.plan.latency);
        // Now and then a packet is sent again.
        if self.random.one_in(50) { usual + self.random.between((ms(20), ms(250))) } else { usual }
    }

    /// When something that is sent now between a worker and the coordinator arrives.
    pub(super) fn arrival(&mut self, process: ProcessId) -> Time {
        let at = self.now + self.latency();
        let stalled = self.processes[process].stalled_until;
        if at < stalled { stalled + self.latency() } else { at }
    }

    pub(super) fn send_up(&mut self, stream: StreamKey, up: Up) {
        let at = self.arrival(self.streams[stream].process).max(self.streams[stream].up_at);
        self.streams[stream].up_at = at;
        if self.streams[stream].up_cut.is_none() {
            self.queue.push(at, Event::Up { stream, up });
        }
    }

    pub(super) fn send_down(&mut self, stream: StreamKey, down: Down) {
        let at = self.arrival(self.streams[stream].process).max(self.streams[stream].down_at);
        self.streams[stream].down_at = at;
        if self.streams[stream].down_cut.is_none() {
            self.queue.push(at, Event::Down { stream, down });
        }
    }

    /// Breaks a stream: some of what is under way is lost, and each side learns it in its own time, within `notices`.
    pub(super) fn break_stream(&mut self, stream: StreamKey, notices: (Duration, Duration)) {
        let broken = "its connection broke";
        let soon = (ms(0), ms(30));
        if self.streams[stream].up_cut.is_none() {
            let cut = self.now + self.random.between(soon);
            self.streams[stream].up_cut = Some(cut);
            let at = cut + self.random.between(notices);
            self.queue.push(at, Event::Up { stream, up: Up::End(broken) });
        }
        if self.streams[stream].down_cut.is_none() {
            let cut = self.now + self.random.between(soon);
            self.streams[stream].down_cut = Some(cut);
            let at = cut + self.random.between(notices);
            self.queue.push(at, Event::Down { stream, down: Down::End(broken) });
        }
    }

    /// Whether something arriving now was lost with its stream.
    pub(super) fn is_lost_up(&self, stream: StreamKey, up: &Up) -> bool {
        !matches!(up, Up::End(_)) && self.streams[stream].up_cut.is_some_and(|cut| self.now > cut)
    }

    /// As [`World::is_lost_up`].
    pub(super) fn is_lost_down(&self, stream: StreamKey, down: &Down) -> bool {
        !matches!(down, Down::End(_)) && self.streams[stream].down_cut.is_some_and(|cut| self.now > cut)
    }
}
