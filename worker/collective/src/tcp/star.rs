//! Everybody's connection with member 0, over which a barrier takes two hops whatever the number of members.
//!
//! Round the ring it takes 2 (n - 1) of them, one after the other, twice around each of NCCL's sums. Here each member tells member 0 that
//! it has come, and member 0 tells everybody once all have. That they mean the same, neighbours in the ring have found out before.

use std::io;
use std::slice;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::links::Link;
use super::socket::{try_read, try_write, wait};
use super::wire::invalid;
use crate::{AbortHandle, Announcement, Error, Stall};

/// A member's end of the star.
#[derive(Debug)]
pub(super) enum Star {
    /// Member 0, with the links to all others, in order.
    Hub(Vec<Link>),
    /// Another, with its link to member 0.
    Spoke(Link),
}

/// The number of the collective: a member that is in another one is found out.
const TOKEN_BYTES: usize = 8;

impl Star {
    pub(super) fn links(&self) -> &[Link] {
        match self {
            Self::Hub(links) => links,
            Self::Spoke(link) => slice::from_ref(link),
        }
    }

    /// Returns once every member has come here with this collective. An error of member 0 comes with whom it waited for; the others wait
    /// for member 0 only because it waits.
    pub(super) fn meet(&self, ours: &Announcement, abort: &AbortHandle, deadline: Instant) -> Result<(), (Error, Option<Stall>)> {
        let token = ours.sequence.to_le_bytes();
        let mut ends: Vec<End> =
            self.links().iter().map(|link| End { link, token, sent: 0, received: 0, inbox: [0; TOKEN_BYTES] }).collect();
        let order = match self {
            Self::Hub(_) => [Direction::In, Direction::Out],
            Self::Spoke(_) => [Direction::Out, Direction::In],
        };
        for direction in order {
            pass(&mut ends, direction, ours, abort, deadline).map_err(|error| {
                let missing = ends.iter().find(|end| !end.is_done(Direction::In)).filter(|_| matches!(self, Self::Hub(_)));
                let received_bytes = ends.iter().map(|end| end.received as u64).sum();
                (error, missing.map(|end| Stall { waiting_for: end.link.member_index, received_bytes }))
            })?;
        }
        Ok(())
    }
}

/// Which way a token goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    In,
    Out,
}

/// One link in one barrier.
struct End<'a> {
    link: &'a Link,
    token: [u8; TOKEN_BYTES],
    sent: usize,
    received: usize,
    inbox: [u8; TOKEN_BYTES],
}

impl End<'_> {
    fn is_done(&self, direction: Direction) -> bool {
        TOKEN_BYTES
            == match direction {
                Direction::In => self.received,
                Direction::Out => self.sent,
            }
    }

    /// Goes as far as it can without waiting.
    fn advance(&mut self, direction: Direction) -> io::Result<()> {
        while !self.is_done(direction) {
            let moved = match direction {
                Direction::In => try_read(&self.link.stream, &mut self.inbox[self.received..])?,
                Direction::Out => try_write(&self.link.stream, &self.token[self.sent..])?,
            };
            let (Some(num_bytes), count) = (moved, if direction == Direction::In { &mut self.received } else { &mut self.sent }) else {
                return Ok(());
            };
            *count += num_bytes;
        }
        if direction == Direction::In && self.inbox != self.token {
            return Err(invalid("the token of another collective"));
        }
        Ok(())
    }

    /// Fails if the link is closed, where nothing is due on it.
    fn watch(&self) -> io::Result<()> {
        match try_read(&self.link.stream, &mut [0])? {
            None => Ok(()),
            Some(_) => Err(invalid("bytes where none were due")),
        }
    }
}

/// Moves a token over every link in one direction. While member 0 waits for the others, it watches those who have come.
fn pass(ends: &mut [End<'_>], direction: Direction, ours: &Announcement, abort: &AbortHandle, deadline: Instant) -> Result<(), Error> {
    let mut is_ready = vec![true; ends.len()];
    loop {
        abort.check()?;
        for (end, _) in ends.iter_mut().zip(&is_ready).filter(|(_, is_ready)| **is_ready) {
            let outcome = if end.is_done(direction) { end.watch() } else { end.advance(direction) };
            outcome.map_err(|source| Error::PeerLost { member_index: end.link.member_index, during: ours.operation, source })?;
        }
        let missing = || ends.iter().filter(|end| !end.is_done(direction));
        if missing().next().is_none() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let waiting_for = missing().map(|end| end.link.member_index).collect();
            return Err(Error::Timeout { during: ours.operation, waiting_for });
        }
        // What has been told may begin the next collective: its link is left alone.
        let flags = |end: &End<'_>| match direction {
            Direction::In => PollFlags::IN,
            Direction::Out if end.is_done(direction) => PollFlags::empty(),
            Direction::Out => PollFlags::OUT,
        };
        let mut fds: Vec<PollFd<'_>> = ends.iter().map(|end| PollFd::new(&end.link.stream, flags(end))).collect();
        wait(&mut fds, deadline).map_err(Error::io("wait for members"))?;
        let events: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        for ((is_ready, had_event), end) in is_ready.iter_mut().zip(events).zip(&*ends) {
            *is_ready = had_event && (direction == Direction::In || !end.is_done(direction));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::thread;
    use std::time::Duration;

    use super::super::MEMBER_ZERO;
    use super::super::socket::configure;
    use super::*;
    use crate::Operation;

    const OURS: Announcement = Announcement { sequence: 7, operation: Operation::Barrier, num_bytes: 0 };

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A hub, and the other ends of its links, which do not block either.
    fn star(num_members: u32) -> (Star, Vec<Link>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pairs = (1..num_members).map(|member_index| {
            let there = configure(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
            let here = configure(listener.accept().unwrap().0).unwrap();
            (Link { member_index, stream: here }, Link { member_index: MEMBER_ZERO, stream: there })
        });
        let (hub, spokes) = pairs.unzip();
        (Star::Hub(hub), spokes)
    }

    #[test]
    fn all_leave_once_all_have_come_again_and_again() {
        let (hub, spokes) = star(6);
        thread::scope(|scope| {
            for star in spokes.into_iter().map(Star::Spoke).chain([hub]) {
                scope.spawn(move || {
                    for sequence in 0..1000 {
                        star.meet(&Announcement { sequence, ..OURS }, &AbortHandle::new(), soon()).unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn the_hub_names_all_who_are_missing_and_tells_nobody_to_go() {
        let (hub, mut spokes) = star(5);
        for at in [0, 2] {
            spokes[at].stream.write_all(&OURS.sequence.to_le_bytes()).unwrap();
        }
        let (error, stall) = hub.meet(&OURS, &AbortHandle::new(), Instant::now()).unwrap_err();
        assert!(matches!(&error, Error::Timeout { waiting_for, .. } if waiting_for[..] == [2, 4]), "{error:?}");
        assert_eq!(stall, Some(Stall { waiting_for: 2, received_bytes: 16 }));
        assert!(spokes.iter().all(|spoke| try_read(&spoke.stream, &mut [0]).unwrap().is_none()));
    }

    #[test]
    fn a_spoke_waits_for_the_hub_and_blames_nobody_else() {
        let (_hub, mut spokes) = star(2);
        let (error, stall) = Star::Spoke(spokes.remove(0)).meet(&OURS, &AbortHandle::new(), Instant::now()).unwrap_err();
        assert!(matches!(&error, Error::Timeout { waiting_for, .. } if waiting_for[..] == [MEMBER_ZERO]), "{error:?}");
        assert_eq!(stall, None);
    }

    #[test]
    fn the_hub_notices_the_loss_of_one_that_has_come_while_it_waits_for_another() {
        let (hub, mut spokes) = star(3);
        spokes[0].stream.write_all(&OURS.sequence.to_le_bytes()).unwrap();
        let waiting = thread::spawn(move || hub.meet(&OURS, &AbortHandle::new(), soon()).unwrap_err());
        drop(spokes.remove(0));
        let (error, _) = waiting.join().unwrap();
        assert!(matches!(error, Error::PeerLost { member_index: 1, during: Operation::Barrier, .. }), "{error:?}");
    }

    #[test]
    fn the_token_of_another_collective_is_a_loss() {
        let (hub, mut spokes) = star(2);
        spokes[0].stream.write_all(&8_u64.to_le_bytes()).unwrap();
        let (error, _) = hub.meet(&OURS, &AbortHandle::new(), soon()).unwrap_err();
        assert!(matches!(&error, Error::PeerLost { source, .. } if source.kind() == io::ErrorKind::InvalidData), "{error:?}");
    }
}
