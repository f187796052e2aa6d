//! What went wrong first: everything after it is most often its consequence.

use super::membership::Worker;
use super::{Core, Effect, Notice, Timestamp};

/// What went wrong first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// In one line.
    pub text: String,
    /// When; none within the event that brought it.
    pub at: Option<Timestamp>,
    /// Whose process it was, if it was one: its end may be explained later.
    pub process: Option<Process>,
    /// What the process wrote last, if that is known.
    pub log: Vec<String>,
}

/// A process of a worker, as its host knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its host.
    pub host: String,
    /// Its id there.
    pub pid: u32,
}

impl Core {
    pub(super) fn note_failure(&mut self, text: String) {
        self.first_failure.get_or_insert(Failure { text, at: None, process: None, log: Vec::new() });
    }

    /// A failure that is the end of a worker's process, or of its stream.
    pub(super) fn note_loss(&mut self, text: String, worker: &Worker) {
        let process = Some(Process { host: worker.host.clone(), pid: worker.pid });
        self.first_failure.get_or_insert(Failure { text, at: None, process, log: Vec::new() });
    }

    /// A process has ended, and its parent knows how. Its stream may not have ended yet, or have ended without a cause.
    pub(super) fn exited(&mut self, now: Timestamp, process: &Process, cause: &str, log: Vec<String>, out: &mut Vec<Effect>) {
        let of_process = |worker: &Worker| worker.pid == process.pid && worker.host == process.host;
        if let Some(id) = self.workers.iter().find(|(_, worker)| of_process(worker)).map(|(&id, _)| id) {
            out.push(Effect::Detach { worker: id });
            self.gone.insert(id);
            self.lose(now, id, cause, out);
        }
        if let Some(first) = self.first_failure.as_mut().filter(|first| first.process.as_ref() == Some(process) && first.log.is_empty()) {
            first.log = log;
            if !first.text.contains(cause) {
                first.text = format!("{}; the process {cause}", first.text);
                out.push(Effect::Notice(Notice::Explained { failure: first.clone() }));
            }
        }
    }
}
