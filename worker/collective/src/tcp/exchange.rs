//! The two ring algorithms as byte streams, without sockets or clocks.
//!
//! Each member sends to the next one and receives from the previous one, both at the same time. What may be sent depends on what has been
//! received: an [`Exchange`] says at any moment which bytes may go out and where the bytes that come in belong. Pieces travel on as soon as
//! they are there, so the ring is always full and no step waits for a whole chunk.

use std::ops::Range;

/// Most bytes moved by one system call: small enough that a piece is still in the cache when it is added and sent on.
pub(super) const SEGMENT_BYTES: usize = 256 * 1024;

/// One member's part in one collective.
pub(super) trait Exchange {
    /// Bytes that may be sent now. Empty while they depend on bytes not yet received, and when all is sent.
    fn outgoing(&self) -> &[u8];
    /// Notes that the first `num_bytes` of [`outgoing`](Self::outgoing) are sent.
    fn sent(&mut self, num_bytes: usize);
    /// Where the next bytes received belong. Empty only when all is received.
    fn incoming(&mut self) -> &mut [u8];
    /// Notes that the first `num_bytes` of [`incoming`](Self::incoming) are filled.
    fn received(&mut self, num_bytes: usize);
    /// Whether everything is sent.
    fn is_sent(&self) -> bool;
    /// Whether everything is received.
    fn is_received(&self) -> bool;
}

/// Ring all-reduce: a reduce-scatter, after which each member holds one chunk of the sum, and an all-gather that passes the chunks round.
///
/// With `n` members the data is cut into `n` chunks. In step `s` of `2 (n - 1)`, member `i` sends chunk `i - s` and receives chunk
/// `i - s - 1` (mod `n`), which is exactly what it sends in step `s + 1`. In the first `n - 1` steps the received chunk is added to its
/// own, afterwards it replaces it. Each chunk is summed along one fixed path and then copied, so all members hold the same bits. Each
/// member sends and receives `2 (n - 1) / n` times the data, the least possible.
///
/// A replacing byte never overtakes the partial sum it was made of: that byte had to pass through this member to become the sum.
///
/// Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
pub(super) struct RingSum<'a> {
    data: &'a mut [f32],
    /// Where bytes to be added arrive; holds at least one element.
    scratch: &'a mut [f32],
    /// Bytes of an element that has arrived in part, at the start of `scratch`: 0..4 between calls.
    num_scratch_bytes: usize,
    member_index: usize,
    num_members: usize,
    sending: Cursor,
    receiving: Cursor,
}

/// A position in the sequence of chunks.
#[derive(Clone, Copy)]
struct Cursor {
    step: usize,
    /// Bytes of the step's chunk that are done.
    offset: usize,
}

impl<'a> RingSum<'a> {
    /// Starts the part of `member_index` of `num_members` (at least 2). `scratch` must not be empty.
    pub(super) fn new(data: &'a mut [f32], scratch: &'a mut [f32], member_index: usize, num_members: usize) -> Self {
        debug_assert!(num_members >= 2 && member_index < num_members && !scratch.is_empty());
        let start = Cursor { step: 0, offset: 0 };
        let mut sum = Self { data, scratch, num_scratch_bytes: 0, member_index, num_members, sending: start, receiving: start };
        sum.sent(0);
        sum.advance_receiving(0);
        sum
    }

    fn num_steps(&self) -> usize {
        2 * (self.num_members - 1)
    }

    /// Elements of the chunk that this member sends in `step`, and receives one step earlier.
    fn chunk(&self, step: usize) -> Range<usize> {
        let index = (self.member_index + 2 * self.num_members - step) % self.num_members;
        let (size, remainder) = (self.data.len() / self.num_members, self.data.len() % self.num_members);
        let start = index * size + index.min(remainder);
        start..start + size + usize::from(index < remainder)
    }

    fn chunk_bytes(&self, step: usize) -> usize {
        self.chunk(step).len() * size_of::<f32>()
    }

    fn advance_receiving(&mut self, num_bytes: usize) {
        self.receiving.offset += num_bytes;
        while !self.is_received() && self.receiving.offset == self.chunk_bytes(self.receiving.step + 1) {
            self.receiving = Cursor { step: self.receiving.step + 1, offset: 0 };
        }
    }

    fn is_adding(&self) -> bool {
        self.receiving.step < self.num_members - 1
    }
}

impl Exchange for RingSum<'_> {
    fn outgoing(&self) -> &[u8] {
        if self.is_sent() {
            return &[];
        }
        let Cursor { step, offset } = self.sending;
        let chunk: &[u8] = bytemuck::cast_slice(&self.data[self.chunk(step)]);
        // This chunk is the one received a step earlier: all of it, or what has come so far. Sending cannot be further ahead than that.
        let end = if step == self.receiving.step + 1 { self.receiving.offset } else { chunk.len() };
        &chunk[offset..end.min(offset + SEGMENT_BYTES)]
    }

    fn sent(&mut self, num_bytes: usize) {
        self.sending.offset += num_bytes;
        while !self.is_sent() && self.sending.offset == self.chunk_bytes(self.sending.step) {
            self.sending = Cursor { step: self.sending.step + 1, offset: 0 };
        }
    }

    fn incoming(&mut self) -> &mut [u8] {
        if self.is_received() {
            return &mut [];
        }
        let Cursor { step, offset } = self.receiving;
        let chunk = self.chunk(step + 1);
        let num_left = chunk.len() * size_of::<f32>() - offset;
        if self.is_adding() {
            let scratch: &mut [u8] = bytemuck::cast_slice_mut(self.scratch);
            let end = num_left.min(scratch.len());
            &mut scratch[self.num_scratch_bytes..end]
        } else {
            let chunk: &mut [u8] = bytemuck::cast_slice_mut(&mut self.data[chunk]);
            &mut chunk[offset..][..num_left.min(SEGMENT_BYTES)]
        }
    }

    fn received(&mut self, num_bytes: usize) {
        if !self.is_adding() {
            return self.advance_receiving(num_bytes);
        }
        // Whole elements are added; the beginning of one that has not arrived whole stays for the next call.
        let num_bytes = self.num_scratch_bytes + num_bytes;
        let num_elements = num_bytes / size_of::<f32>();
        let num_whole_bytes = num_elements * size_of::<f32>();
        let start = self.chunk(self.receiving.step + 1).start + self.receiving.offset / size_of::<f32>();
        for (sum, term) in self.data[start..][..num_elements].iter_mut().zip(&*self.scratch) {
            *sum += *term;
        }
        bytemuck::cast_slice_mut::<f32, u8>(self.scratch).copy_within(num_whole_bytes..num_bytes, 0);
        self.num_scratch_bytes = num_bytes - num_whole_bytes;
        self.advance_receiving(num_whole_bytes);
    }

    fn is_sent(&self) -> bool {
        self.sending.step == self.num_steps()
    }

    fn is_received(&self) -> bool {
        self.receiving.step == self.num_steps()
    }
}

/// Ring broadcast: the root's bytes travel round once, each member passing on what has arrived.
pub(super) struct RingCopy<'a> {
    data: &'a mut [u8],
    is_root: bool,
    /// The member before the root: nobody behind it needs the data.
    is_last: bool,
    num_sent: usize,
    num_received: usize,
}

impl<'a> RingCopy<'a> {
    /// Starts the part of `member_index` in a broadcast from `root`, in a ring of `num_members` (at least 2).
    pub(super) fn new(data: &'a mut [u8], root: usize, member_index: usize, num_members: usize) -> Self {
        let is_last = (member_index + 1) % num_members == root;
        Self { data, is_root: member_index == root, is_last, num_sent: 0, num_received: 0 }
    }
}

impl Exchange for RingCopy<'_> {
    fn outgoing(&self) -> &[u8] {
        if self.is_last {
            return &[];
        }
        let end = if self.is_root { self.data.len() } else { self.num_received };
        &self.data[self.num_sent..end.min(self.num_sent + SEGMENT_BYTES)]
    }

    fn sent(&mut self, num_bytes: usize) {
        self.num_sent += num_bytes;
    }

    fn incoming(&mut self) -> &mut [u8] {
        if self.is_root {
            return &mut [];
        }
        let end = self.data.len().min(self.num_received + SEGMENT_BYTES);
        &mut self.data[self.num_received..end]
    }

    fn received(&mut self, num_bytes: usize) {
        self.num_received += num_bytes;
    }

    fn is_sent(&self) -> bool {
        self.is_last || self.num_sent == self.data.len()
    }

    fn is_received(&self) -> bool {
        self.is_root || self.num_received == self.data.len()
    }
}

/// Nothing but the announcements.
pub(super) struct NoData;

impl Exchange for NoData {
    fn outgoing(&self) -> &[u8] {
        &[]
    }

    fn sent(&mut self, _num_bytes: usize) {}

    fn incoming(&mut self) -> &mut [u8] {
        &mut []
    }

    fn received(&mut self, _num_bytes: usize) {}

    fn is_sent(&self) -> bool {
        true
    }

    fn is_received(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::conformance::Random;

    /// Runs the members of a ring against each other over queues that take and give random small pieces.
    fn run_ring<E: Exchange>(members: &mut [E], random: &mut Random) {
        let mut links: Vec<VecDeque<u8>> = members.iter().map(|_| VecDeque::new()).collect();
        while members.iter().any(|member| !member.is_sent() || !member.is_received()) {
            let (from, is_sending) = (random.below(members.len()), random.below(2) == 0);
            if is_sending {
                let outgoing = members[from].outgoing();
                let count = random.below(outgoing.len().min(11) + 1);
                links[from].extend(&outgoing[..count]);
                members[from].sent(count);
            } else {
                let to = (from + 1) % members.len();
                let incoming = members[to].incoming();
                let count = random.below(incoming.len().min(links[from].len()).min(11) + 1);
                incoming.iter_mut().zip(links[from].drain(..count)).for_each(|(slot, byte)| *slot = byte);
                members[to].received(count);
            }
        }
        assert!(links.iter().all(VecDeque::is_empty), "bytes nobody wanted");
    }

    #[test]
    fn a_sum_is_whole_however_the_streams_are_cut() {
        let mut random = Random::new(1);
        for num_members in [2, 3, 5] {
            for len in [0, 1, num_members - 1, num_members, num_members + 1, 7, 64, 101] {
                let mut data: Vec<Vec<f32>> = (0..num_members).map(|m| (0..len).map(|i| (i * 7 + m * 1000) as f32).collect()).collect();
                let mut scratch = vec![[0.0; 3]; num_members];
                let mut members: Vec<_> = (data.iter_mut().zip(&mut scratch).enumerate())
                    .map(|(index, (data, scratch))| RingSum::new(data, scratch, index, num_members))
                    .collect();
                run_ring(&mut members, &mut random);
                let pairs = num_members * (num_members - 1) / 2;
                let expected: Vec<f32> = (0..len).map(|i| (i * 7 * num_members + pairs * 1000) as f32).collect();
                assert!(data.iter().all(|data| *data == expected), "{num_members} members, {len} elements");
            }
        }
    }

    #[test]
    fn a_broadcast_arrives_whole_however_the_streams_are_cut() {
        let mut random = Random::new(2);
        for (num_members, root, len) in [(2, 0, 50), (2, 1, 0), (3, 1, 77), (5, 4, 1), (5, 2, 300)] {
            let mut data: Vec<Vec<u8>> = (0..num_members).map(|m| (0..len).map(|i| (i + m * 13) as u8).collect()).collect();
            let expected = data[root].clone();
            let mut members: Vec<_> =
                data.iter_mut().enumerate().map(|(index, data)| RingCopy::new(data, root, index, num_members)).collect();
            run_ring(&mut members, &mut random);
            assert!(data.iter().all(|data| *data == expected), "{num_members} members, root {root}, {len} bytes");
        }
    }
}
