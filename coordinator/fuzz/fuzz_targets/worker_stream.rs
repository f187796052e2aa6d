//! A member of a running world that says anything: the rules refuse it or go on, and never panic or run away.
#![no_main]

use std::time::Duration;

use peapod_coordinator::core::order::Source;
use peapod_coordinator::core::{Config, Core, Effect, Event, StreamId};
use peapod_proto::ids::{Incarnation, Rank, Step, WorkerId};
use peapod_proto::message::{FromWorker, Hello};
use peapod_proto::{PROGRAM_VERSION, PROTOCOL_VERSION, v1};
use prost::Message;

const WORLD_SIZE: u32 = 2;
/// Messages of one input: more only take time.
const MAX_MESSAGES: usize = 64;

fn config() -> Config {
    Config {
        world_size: WORLD_SIZE,
        min_world_size: WORLD_SIZE,
        heartbeat_timeout: Duration::from_secs(3),
        join_timeout: Duration::from_secs(60),
        data_patience: Duration::from_secs(30),
        job_id: "job".into(),
        job_toml: String::new(),
        seed: 1,
        shards: (0..4).map(|shard| format!("{shard}.tar")).collect(),
        sources: [Source::unnamed(4)].into(),
        epochs: None,
        last_step: Some(Step(100)),
        workers_are_alike: false,
        global_batch: 16,
        scale_batch: false,
        checkpoint_every: Duration::from_secs(300),
        max_bad_fraction: 0.05,
        max_skipped_steps: 2,
    }
}

/// A world in its first generation, and its members.
fn running() -> (Core, Vec<(WorkerId, StreamId)>) {
    let mut core = Core::new(config(), None);
    let now = Duration::ZERO;
    let mut members = Vec::new();
    for rank in 0..WORLD_SIZE {
        let stream = StreamId(u64::from(rank) + 1);
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            program_version: PROGRAM_VERSION.into(),
            incarnation: Incarnation(u64::from(rank)),
            attempt: 0,
            requested_rank: Some(Rank(rank)),
            host: "host".into(),
            pid: 1,
            device: "cpu".into(),
        };
        for effect in core.step(now, Event::Hello { stream, hello }).expect("a hello of a rank that is free") {
            if let Effect::Attach { worker, stream } = effect {
                members.push((worker, stream));
            }
        }
    }
    for &(worker, stream) in &members {
        let message = FromWorker::Ready { model_digest: vec![7], num_parameters: 10 };
        core.step(now, Event::Message { worker, stream, message }).expect("ready");
    }
    let (worker, stream) = members[0];
    let message = FromWorker::Bootstrap { generation: core.generation(), bytes: vec![1] };
    core.step(now, Event::Message { worker, stream, message }).expect("a bootstrap");
    (core, members)
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let (mut core, members) = running();
    let (mut rest, mut now) = (bytes, Duration::ZERO);
    for _ in 0..MAX_MESSAGES {
        let Some((&start, after)) = rest.split_first() else { return };
        let (worker, stream) = members[usize::from(start) % members.len()];
        now += Duration::from_millis(u64::from(start) * 10);
        rest = after;
        let event = match v1::FromWorker::decode_length_delimited(&mut rest).map(FromWorker::try_from) {
            Ok(Ok(message)) => Event::Message { worker, stream, message },
            Ok(Err(_)) => Event::Tick,
            Err(_) => return,
        };
        let _ = core.step(now, event);
    }
});
