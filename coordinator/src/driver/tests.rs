use peapod_proto::ids::Incarnation;
use peapod_proto::message::{Heartbeat, Memory, Phase, StepLosses, StepRecord, StepReport, StepTimings};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION};

use super::*;
use crate::core::order::Source;
use crate::core::tests::config;
use crate::core::{Config, Fact, State};
use crate::logs::Logs;
use crate::observe::{Bar, Validation};

/// Forgets everything.
struct Nowhere;

impl Journal for Nowhere {
    fn append(&mut self, _fact: &Fact) -> Result<(), JournalError> {
        Ok(())
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        Ok(())
    }

    fn flush_at(&self) -> Option<Instant> {
        None
    }

    fn is_long(&self) -> bool {
        false
    }

    fn compact(&mut self, _state: &State) -> Result<(), JournalError> {
        Ok(())
    }
}

/// Of one worker and one shard.
fn one() -> Config {
    Config { shards: Arc::new(["0.tar".to_owned()]), sources: Arc::new([Source::unnamed(1)]), ..config(1) }
}

/// A driver with one worker that trains, and what is sent to it.
fn training() -> (Driver, WorkerId, StreamId, mpsc::Receiver<ToWorker>) {
    training_in(mpsc::channel(1).1, one())
}

fn training_in(inbox: mpsc::Receiver<Command>, config: Config) -> (Driver, WorkerId, StreamId, mpsc::Receiver<ToWorker>) {
    let (outbound, messages) = mpsc::channel(OUTBOUND_CAPACITY);
    let kind = Validation { feature_weight: 0.1, of_average: false };
    let observer = Observer::new(Bar::default(), Logs::default(), kind, Step(0), None);
    let mut driver = Driver::new(Core::new(config, None), inbox, Box::new(Nowhere), observer);
    let hello = Hello {
        protocol_version: PROTOCOL_VERSION,
        program_version: PROGRAM_VERSION.into(),
        incarnation: Incarnation(1),
        attempt: 0,
        requested_rank: None,
        host: String::new(),
        pid: 1,
        device: String::new(),
    };
    let (reply, mut answer) = oneshot::channel();
    driver.handle(Command::Hello { hello, outbound, reply });
    let (worker, stream) = answer.try_recv().unwrap().unwrap();
    let tell = |driver: &mut Driver, message| drop(driver.tell(Event::Message { worker, stream, message }));
    tell(&mut driver, FromWorker::Ready { model_digest: vec![1], num_parameters: 1 });
    let generation = driver.core.generation();
    tell(&mut driver, FromWorker::Bootstrap { generation, bytes: vec![1] });
    assert_eq!(driver.core.state(), "training");
    (driver, worker, stream, messages)
}

impl Driver {
    fn train(&mut self, worker: WorkerId, stream: StreamId, step: u64, snapshot: Option<u64>) {
        let (generation, step) = (self.core.generation(), Step(step));
        let losses = StepLosses::default();
        let record = Some(StepRecord { step, generation, names: vec![], native: 0, skipped: false, losses, validation: None });
        let report = StepReport { generation, step, record, timings: StepTimings::default(), snapshot };
        self.tell(Event::Message { worker, stream, message: FromWorker::StepReport(report) });
    }

    fn records(&mut self, step: u64) -> oneshot::Receiver<Result<Records, String>> {
        let (reply, answer) = oneshot::channel();
        self.handle(Command::RecordsOf { step: Step(step), generation: self.core.generation(), reply });
        answer
    }
}

#[test]
fn upload_of_a_final_step_that_nobody_awaits_is_answered() {
    let (mut driver, worker, stream, _messages) = training();
    let mut early = [driver.records(1), driver.records(2)];
    assert!(early.iter_mut().all(|answer| answer.try_recv().is_err()), "neither step is final");
    // The report of the copy was lost with the first.
    driver.train(worker, stream, 1, None);
    driver.train(worker, stream, 2, Some(7));
    let [first, second] = early.map(|mut answer| answer.try_recv().unwrap());
    assert_eq!(first.unwrap_err(), "no copy of step 1 is awaited");
    assert_eq!(second.unwrap().ledger, Arc::new(Ledger::new(1)));
    assert!(driver.records(1).try_recv().unwrap().is_err() && driver.records(2).try_recv().unwrap().is_ok());
}

#[test]
fn copy_that_too_many_later_ones_have_overtaken_is_awaited_no_more() {
    let (mut driver, worker, stream, _messages) = training();
    for step in 1..=MAX_FROZEN as u64 + 1 {
        driver.train(worker, stream, step, Some(7));
    }
    let generation = driver.core.generation();
    assert!(!driver.core.awaits_checkpoint(Step(1), generation) && driver.core.awaits_checkpoint(Step(2), generation));
    assert!(driver.records(1).try_recv().unwrap().is_err() && driver.records(2).try_recv().unwrap().is_ok());
}

#[test]
fn sign_of_life_that_waits_for_its_turn_is_no_silence() {
    let (commands, inbox) = mpsc::channel(1);
    let timeout = Duration::from_millis(100);
    let (mut driver, worker, stream, _messages) = training_in(inbox, Config { heartbeat_timeout: timeout, ..one() });
    std::thread::sleep(2 * timeout);
    let generation = driver.core.generation();
    let heartbeat = FromWorker::Heartbeat(Heartbeat { step: Step(0), phase: Phase::Data, generation, reads: 0, memory: Memory::default() });
    commands.try_send(Command::Tell(Event::Message { worker, stream, message: heartbeat })).unwrap();
    assert_eq!((driver.tick(), driver.status().workers.len()), (None, 1));
    std::thread::sleep(2 * timeout);
    assert_eq!((driver.tick(), driver.status().workers.len()), (None, 0));
    // The look at the clock does not keep the coordinator from going.
    commands.try_send(Command::GoAway).unwrap();
    assert_eq!(driver.tick(), Some(Ending::Away));
}

#[test]
fn who_has_given_up_is_not_kept() {
    let (mut driver, ..) = training();
    (0..3).for_each(|_| drop(driver.records(1)));
    let _last = driver.records(1);
    assert_eq!(driver.waiters.len(), 1);
}

#[tokio::test]
async fn who_waits_for_the_end_is_told_it_once_also_after_it() {
    let (commands, inbox) = mpsc::channel(2);
    let (mut driver, ..) = training_in(inbox, one());
    let (reply, early) = oneshot::channel();
    driver.handle(Command::Ended { reply });
    let (reply, mut gone) = oneshot::channel();
    driver.handle(Command::Ended { reply });
    gone.close();
    commands.send(Command::GoAway).await.unwrap();
    let (_, mut driver) = driver.run().await;
    let ((_, history), ending) = *early.await.unwrap();
    assert_eq!((ending, history.ended.is_some()), (Ending::Away, true));
    let (reply, mut late) = oneshot::channel();
    driver.handle(Command::Ended { reply });
    assert_eq!(late.try_recv().unwrap().1, Ending::Away);
}

#[test]
fn what_a_worker_holds_in_memory_is_known_from_its_heartbeats() {
    let (mut driver, worker, stream, _messages) = training();
    let memory = Memory { resident_bytes: Some(5), gpu: None };
    let generation = driver.core.generation();
    let heartbeat = FromWorker::Heartbeat(Heartbeat { step: Step(0), phase: Phase::Data, generation, reads: 0, memory });
    driver.handle(Command::Tell(Event::Message { worker, stream, message: heartbeat }));
    let (status, history) = driver.look();
    assert_eq!(history.seen(&status.workers[0]).unwrap().memory, memory);
}
