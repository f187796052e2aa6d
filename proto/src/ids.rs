//! Ids and quantities as types, so that a rank cannot be passed where a shard is meant.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty) $format:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

id! {
    /// A worker's number in 0..world_size, kept for its life (`worker --rank`).
    Rank(u32) "{}"
}
id! {
    /// A worker process as the coordinator knows it; survives changes of the membership.
    WorkerId(u64) "w{}"
}
id! {
    /// A membership of the collective; never repeated. Fixed width, so that object keys sort.
    Generation(u64) "g{:06}"
}
id! {
    /// One pass over the data.
    Epoch(u32) "{}"
}
id! {
    /// One optimiser update. Step 0 is the state before the first.
    Step(u64) "{}"
}
id! {
    /// Index into the job's expanded shard list.
    ShardId(u32) "{}"
}
id! {
    /// An exclusive right to read one shard in one epoch, held while its holder is a live member.
    LeaseId(u64) "{}"
}
id! {
    /// A worker's place among the members of one generation, dense from 0 (what NCCL calls its rank).
    MemberIndex(u32) "{}"
}
id! {
    /// Drawn at random by a worker process when it starts.
    Incarnation(u64) "{:016x}"
}

impl Step {
    /// The step after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl Generation {
    /// No generation: what a worker holds that never was a member.
    pub const NONE: Self = Self(0);

    /// The generation after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A sample's name: unique within a job, small enough to travel as three exact `f32` integers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SampleName {
    /// The pass over the data.
    pub epoch: Epoch,
    /// The shard.
    pub shard: ShardId,
    /// Position in the shard, in tar order.
    pub index: u32,
}

impl SampleName {
    /// Each of the three numbers is below this: `f32` holds every integer up to here exactly.
    pub const LIMIT: u32 = 1 << 24;
}

impl fmt::Display for SampleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.epoch, self.shard, self.index)
    }
}

/// A lease's samples that are not to be read again: one bit each, in tar order.
///
/// Grows as bits are set; a bit past the end reads as unset.
///
/// Serialises as a string of hexadecimal digits, two a byte.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Bitmap(Vec<u8>);

impl Serialize for Bitmap {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bitmap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let bytes = hex::decode(String::deserialize(deserializer)?);
        bytes.map(Self).map_err(|error| D::Error::custom(format!("a bitmap is an even number of hexadecimal digits: {error}")))
    }
}

impl Bitmap {
    /// The bitmap with these bytes, lowest bit first.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// Its bytes, lowest bit first.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether bit `index` is set.
    #[must_use]
    pub fn contains(&self, index: u32) -> bool {
        self.0.get(index as usize / 8).is_some_and(|byte| byte & (1 << (index % 8)) != 0)
    }

    /// Sets bit `index`; says whether it was unset before.
    pub fn insert(&mut self, index: u32) -> bool {
        let byte = index as usize / 8;
        if byte >= self.0.len() {
            self.0.resize(byte + 1, 0);
        }
        let mask = 1 << (index % 8);
        let fresh = self.0[byte] & mask == 0;
        self.0[byte] |= mask;
        fresh
    }

    /// One more than the highest bit that is set; 0 if none is.
    #[must_use]
    pub fn end(&self) -> u32 {
        let last = self.0.iter().enumerate().rev().find(|&(_, &byte)| byte != 0);
        last.map_or(0, |(at, byte)| at as u32 * 8 + 8 - byte.leading_zeros())
    }

    /// Number of set bits.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }

    /// The bits set in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let (long, short) = if self.0.len() >= other.0.len() { (self, other) } else { (other, self) };
        let mut bytes = long.0.clone();
        for (byte, more) in bytes.iter_mut().zip(&short.0) {
            *byte |= more;
        }
        Self(bytes)
    }

    /// The set bits, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.0.len() as u32 * 8).filter(|&index| self.contains(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_counts_each_bit_once() {
        let mut bitmap = Bitmap::default();
        assert!(bitmap.insert(9));
        assert!(!bitmap.insert(9));
        assert!(bitmap.insert(0));
        assert_eq!((bitmap.count(), bitmap.contains(9), bitmap.contains(1000)), (2, true, false));
        assert_eq!(bitmap.iter().collect::<Vec<_>>(), [0, 9]);
        assert_eq!((bitmap.as_bytes(), bitmap.end()), ([1, 2].as_slice(), 10));
        assert_eq!([vec![], vec![0, 0], vec![0, 128, 0]].map(|bytes| Bitmap::from_bytes(bytes).end()), [0, 0, 16]);
    }

    #[test]
    fn bitmap_union_keeps_the_longer_tail() {
        let mut long = Bitmap::default();
        long.insert(20);
        let mut short = Bitmap::default();
        short.insert(3);
        let both = short.union(&long);
        assert_eq!(both.iter().collect::<Vec<_>>(), [3, 20]);
        assert_eq!(both, long.union(&short));
    }

    #[test]
    fn bitmap_is_hexadecimal_text() {
        let mut bitmap = Bitmap::default();
        bitmap.insert(9);
        let text = toml::Value::try_from(&bitmap).unwrap();
        assert_eq!(text.as_str(), Some("0002"));
        assert_eq!(Bitmap::deserialize(text).unwrap(), bitmap);
        assert!(Bitmap::deserialize(toml::Value::String("0x".into())).is_err());
    }

    #[test]
    fn generations_sort_as_text() {
        assert!(Generation(9).to_string() < Generation(10).to_string());
    }
}
