//! The shards that a ledger's numbers stand for, kept beside it: in a list that has changed they would stand for others.

use peapod_proto::program::counted;
use serde::{Deserialize, Serialize};

use crate::core::order::Source;
use crate::store::sha256;

/// The shards of one source, as far as two lists have to be told apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardList {
    /// The source; empty if the job names none.
    pub source: String,
    /// How many they are.
    pub num_shards: u32,
    /// SHA-256 of their addresses, in their order, hexadecimal.
    pub sha256: String,
}

impl ShardList {
    /// The lists of all `sources`, whose shards follow each other in `shards`.
    #[must_use]
    pub fn of(shards: &[String], sources: &[Source]) -> Vec<Self> {
        let mut rest = shards;
        let list = |source: &Source| {
            let (own, others) = rest.split_at((source.num_shards as usize).min(rest.len()));
            rest = others;
            Self { source: source.name.clone(), num_shards: source.num_shards, sha256: hex::encode(sha256(own.join("\n").as_bytes())) }
        };
        sources.iter().map(list).collect()
    }

    fn name(&self) -> String {
        if self.source.is_empty() { "data.shards".into() } else { format!("data.sources {:?}", self.source) }
    }
}

/// A line for each source whose shards are not those of `before`.
///
/// Shards that were added at the end are a change too: the order in which an epoch goes through its shards depends on how many there are.
#[must_use]
pub fn changes(before: &[ShardList], now: &[ShardList]) -> Vec<String> {
    let change = |now: &ShardList| {
        let then = before.iter().find(|then| then.source == now.source)?;
        (then != now).then(|| match (then.num_shards, now.num_shards) {
            (then, same) if then == same => format!("{}: {} as before, but others or in another order", now.name(), counted(same, "shard")),
            (then, num) => format!("{}: {} now, {then} then", now.name(), counted(num, "shard")),
        })
    };
    now.iter().filter_map(change).collect()
}

/// What to do about a list that has changed.
pub const RESTORE: &str = "What is trained is written down by a shard's place in the list. To go on, make the patterns and @lists give the same \
                           shards in the same order again; to train on others, start anew with another --state-dir";

#[cfg(test)]
mod tests {
    use super::*;

    fn lists(first: &[&str], second: &[&str]) -> Vec<ShardList> {
        let shards: Vec<String> = first.iter().chain(second).map(|shard| (*shard).to_owned()).collect();
        let source = |name: &str, shards: &[&str]| Source { name: name.into(), num_shards: shards.len() as u32, weight: 1.0 };
        ShardList::of(&shards, &[source("a", first), source("b", second)])
    }

    #[test]
    fn source_whose_shards_are_others_is_named() {
        let before = lists(&["0", "2"], &["x"]);
        assert!(changes(&before, &lists(&["0", "2"], &["x"])).is_empty());
        assert_eq!(changes(&before, &lists(&["0", "1", "2"], &["x"])), ["data.sources \"a\": 3 shards now, 2 then"]);
        assert_eq!(
            changes(&before, &lists(&["0", "2"], &["y"])),
            ["data.sources \"b\": 1 shard as before, but others or in another order"]
        );
        assert_eq!(changes(&before, &lists(&["2", "0"], &["x", "y"])).len(), 2);
        assert!(changes(&[], &before).is_empty(), "a checkpoint of before these were kept");
    }
}
