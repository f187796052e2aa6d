//! What went wrong first: everything after it is most often its consequence.

use peapod_proto::ids::{Generation, Step};

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
    /// The generation that was current then.
    pub generation: Generation,
    /// The first step that became final in a generation formed after it: the job has got over it, and what fails later has another cause.
    pub healed: Option<Step>,
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
        self.note(text, None);
    }

    /// A failure that is the end of a worker's process, or of its stream.
    pub(super) fn note_loss(&mut self, text: String, worker: &Worker) {
        self.note(text, Some(Process { host: worker.host.clone(), pid: worker.pid }));
    }

    fn note(&mut self, text: String, process: Option<Process>) {
        if self.first_failure.as_ref().is_none_or(|first| first.healed.is_some()) {
            let generation = self.generation;
            self.first_failure = Some(Failure { text, at: None, process, log: Vec::new(), generation, healed: None });
        }
    }

    /// A step of `generation` is final.
    pub(super) fn get_over_failure(&mut self, step: Step, generation: Generation) {
        if let Some(first) = self.first_failure.as_mut().filter(|first| first.healed.is_none() && first.generation < generation) {
            first.healed = Some(step);
        }
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
