//! What the data threads say, in the coordinator's words.

use peapod_data::{LoaderEvent, Reason, ShardEnd, Skip};
use peapod_proto::ids::LeaseId;
use peapod_proto::message::{ShardReport, SkipReason, SkippedSample};

use super::Output;

pub fn data_output(event: LoaderEvent) -> Output {
    match event {
        LoaderEvent::NeedLeases { num, is_idle } => Output::NeedLeases { num, is_idle },
        LoaderEvent::GaveBack { lease, from } => Output::GaveBack { lease, from },
        LoaderEvent::Shard { lease, skipped, end } => Output::Read(shard_report(lease, skipped, end)),
    }
}

fn shard_report(lease: LeaseId, skipped: Vec<Skip>, end: Option<ShardEnd>) -> ShardReport {
    let skip = |skip: Skip| SkippedSample {
        index: skip.index,
        reason: match skip.rule.reason() {
            Reason::Filtered => SkipReason::Filtered,
            Reason::Bad => SkipReason::Bad,
        },
        detail: skip.detail(),
        key: skip.key,
    };
    ShardReport {
        lease,
        skipped: skipped.into_iter().map(skip).collect(),
        num_samples: end.as_ref().map(|end| end.num_samples),
        truncated: end.and_then(|end| end.truncated).unwrap_or_default(),
    }
}
