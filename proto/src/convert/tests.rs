use super::*;

fn validation(step: u64) -> ValidationLosses {
    ValidationLosses { step: Step(step), samples: 5, task: 0.5, logit: 0.25, feature: 3.0 }
}

fn beat(phase: Phase, memory: Memory) -> Heartbeat {
    Heartbeat { step: Step(9), phase, generation: Generation(2), reads: 7, memory }
}

fn record(step: u64) -> StepRecord {
    StepRecord {
        step: Step(step),
        generation: Generation(2),
        names: vec![SampleName { epoch: Epoch(1), shard: ShardId(3), index: 7 }],
        native: 1,
        skipped: false,
        losses: StepLosses { task: 1.0, ..StepLosses::default() },
        validation: Some(validation(step - 1)),
    }
}

#[test]
fn typed_messages_survive_the_wire() {
    let up = [
        FromWorker::StepReport(StepReport {
            generation: Generation(2),
            step: Step(9),
            record: Some(record(9)),
            timings: StepTimings { data: 0.1, validation: 2.0, sampling: 3.0, ..StepTimings::default() },
            snapshot: Some(77),
        }),
        FromWorker::Stopped(Stopped {
            generation: Generation(2),
            applied: Step(9),
            cause: StopCause::Planned,
            records: vec![record(8), record(9)],
            reason: String::new(),
            validation: Some(validation(9)),
            trained_in: Generation(2),
            lost_member: Some(MemberIndex(1)),
            stalled: Some(Stall { waiting_for: MemberIndex(2), received_bytes: 77 }),
        }),
        FromWorker::Continuing(Continuing { generation: Generation(2), applied: Step(9), records: vec![record(9)] }),
        FromWorker::Heartbeat(beat(Phase::Validating, Memory::default())),
        FromWorker::Heartbeat(beat(Phase::Warming, Memory { resident_bytes: Some(7 << 30), gpu: None })),
        FromWorker::Heartbeat(beat(
            Phase::Fetching,
            Memory { resident_bytes: None, gpu: Some(GpuMemory { used_bytes: 3, total_bytes: 4 }) },
        )),
        FromWorker::LeaseRequest { generation: Generation(2), num_leases: 1, is_idle: true },
        FromWorker::GaveBack { lease: LeaseId(4), from: 17 },
        FromWorker::ShardReport(ShardReport {
            lease: LeaseId(4),
            skipped: vec![SkippedSample { index: 3, reason: SkipReason::Bad, key: "k".into(), detail: "no jpg".into() }],
            num_samples: Some(10),
            truncated: String::new(),
        }),
    ];
    for message in up {
        assert_eq!(FromWorker::try_from(v1::FromWorker::from(message.clone())), Ok(message));
    }
}

#[test]
fn gate_refuses_what_no_honest_peer_sends() {
    assert!(FromWorker::try_from(v1::FromWorker { message: None }).is_err());
    let mut wire = v1::FromWorker::from(FromWorker::StepReport(StepReport {
        generation: Generation(2),
        step: Step(10),
        record: Some(record(9)),
        timings: StepTimings::default(),
        snapshot: None,
    }));
    assert!(FromWorker::try_from(wire.clone()).unwrap_err().to_string().contains("step_report.record"));
    if let Some(v1::from_worker::Message::StepReport(report)) = &mut wire.message {
        report.step = 9;
        report.record.as_mut().unwrap().names[0].index = 1 << 24;
    }
    assert!(FromWorker::try_from(wire.clone()).unwrap_err().to_string().contains("step_record.names"));
    if let Some(v1::from_worker::Message::StepReport(report)) = &mut wire.message {
        report.record.as_mut().unwrap().names.clear();
        report.record.as_mut().unwrap().validation.as_mut().unwrap().samples = 0;
    }
    assert!(FromWorker::try_from(wire).unwrap_err().to_string().contains("validation.samples"));
    let impossible = Memory { resident_bytes: None, gpu: Some(GpuMemory { used_bytes: 5, total_bytes: 4 }) };
    let wire = v1::FromWorker::from(FromWorker::Heartbeat(beat(Phase::Compute, impossible)));
    assert!(FromWorker::try_from(wire).unwrap_err().to_string().contains("heartbeat.memory.gpu.used_bytes: 5 is more than the 4"));
    let index = v1::ToWorker {
        message: Some(v1::to_worker::Message::Assignment(v1::Assignment { member_index: 2, num_members: 2, ..Default::default() })),
    };
    assert!(ToWorker::try_from(index).is_err());
}

#[test]
fn worker_that_says_nothing_of_its_memory_is_understood() {
    let wire = v1::Heartbeat { step: 9, phase: v1::Phase::Compute.into(), generation: 2, reads: 7, memory: None };
    let wire = v1::FromWorker { message: Some(v1::from_worker::Message::Heartbeat(wire)) };
    assert_eq!(FromWorker::try_from(wire), Ok(FromWorker::Heartbeat(beat(Phase::Compute, Memory::default()))));
}

#[test]
fn every_phase_has_its_number_here_and_on_the_wire() {
    for (place, known) in Phase::ALL.into_iter().enumerate() {
        assert_eq!(known as usize, place, "{known:?}");
        assert_eq!(phase(v1::Phase::from(known).into()).unwrap(), known);
    }
    assert!(v1::Phase::try_from(Phase::ALL.len() as i32).is_ok(), "the wire's first number stands for none");
    assert!(v1::Phase::try_from(Phase::ALL.len() as i32 + 1).is_err(), "a phase of the wire is not in the list");
}
