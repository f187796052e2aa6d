//! Checkpoints on their way to the coordinator's store: one at a time, and the newest of those that wait.
//!
//! A store that is slower than checkpoints are due would otherwise let copies of the weights pile up in a worker's memory.

use tokio::task::{JoinError, JoinSet};

/// Copies of the weights that are being sent, and the one that is sent next.
#[derive(Debug)]
pub struct Outbox<T> {
    sending: JoinSet<()>,
    waiting: Option<T>,
}

impl<T> Default for Outbox<T> {
    fn default() -> Self {
        Self { sending: JoinSet::new(), waiting: None }
    }
}

impl<T> Outbox<T> {
    /// Takes a copy over. Returns the one that waited until now: it is not sent any more, and the coordinator forgets it as soon as this
    /// one is stored.
    pub fn put(&mut self, copy: T) -> Option<T> {
        self.waiting.replace(copy)
    }

    /// Takes out what is to be sent now, if fewer than `limit` are on their way.
    pub fn take(&mut self, limit: usize) -> Option<T> {
        self.waiting.take_if(|_| self.sending.len() < limit)
    }

    /// Runs the sending of a copy that was taken out.
    pub fn send(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.sending.spawn(task);
    }

    /// Waits until one has been sent or given up; `None` if none is on its way. An error is a sending that panicked. Losing the future
    /// loses nothing.
    pub async fn sent(&mut self) -> Option<Result<(), JoinError>> {
        self.sending.join_next().await
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    /// An outbox that is sending `num` copies, and what ends each.
    fn sending(num: usize) -> (Outbox<u32>, Vec<oneshot::Sender<()>>) {
        let mut outbox = Outbox::default();
        let end = |_| {
            let (end, ended) = oneshot::channel();
            outbox.send(async { drop(ended.await) });
            end
        };
        let ends = (0..num).map(end).collect();
        (outbox, ends)
    }

    #[tokio::test]
    async fn one_is_sent_at_a_time_and_the_newest_of_those_that_wait_is_next() {
        let (mut outbox, mut ends) = sending(1);
        assert_eq!((outbox.put(10), outbox.take(1)), (None, None));
        assert_eq!((outbox.put(20), outbox.put(30)), (Some(10), Some(20)), "what is replaced is told");
        ends.remove(0).send(()).unwrap();
        assert!(matches!(outbox.sent().await, Some(Ok(()))));
        assert_eq!((outbox.take(1), outbox.take(1)), (Some(30), None));
        assert!(outbox.sent().await.is_none(), "nothing is on its way");
    }

    #[tokio::test]
    async fn one_that_fails_makes_room_too() {
        let (mut outbox, ends) = sending(1);
        outbox.put(10);
        outbox.sending.abort_all();
        assert!(matches!(outbox.sent().await, Some(Err(_))));
        assert_eq!(outbox.take(1), Some(10));
        drop(ends);
    }

    #[tokio::test]
    async fn what_cannot_wait_is_sent_beside_the_one_on_its_way() {
        let (mut outbox, _ends) = sending(1);
        outbox.put(10);
        assert_eq!(outbox.take(2), Some(10));
        outbox.put(20);
        assert_eq!(outbox.take(usize::MAX), Some(20));
        let (mut outbox, _ends) = sending(2);
        outbox.put(30);
        assert_eq!(outbox.take(2), None);
    }
}
