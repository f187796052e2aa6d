//! A member's connections, and the loop that moves an [`Exchange`]'s bytes over the two in the ring.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::exchange::Exchange;
use super::socket::{try_read, try_write, unless_blocked, wait};
use super::star::Star;
use super::wire::{HEADER_BYTES, decode_header, encode_header, invalid};
use crate::{AbortHandle, Announcement, Error, Operation, Stall};

/// The links to both neighbours; data flows from the previous member to the next one. With two members both lead to the same peer. And
/// those of the star.
#[derive(Debug)]
pub(super) struct Links {
    pub(super) previous: Link,
    pub(super) next: Link,
    pub(super) star: Star,
}

/// A proved connection. Its socket does not block.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) member_index: u32,
    pub(super) stream: TcpStream,
}

impl Links {
    /// Closes all connections, also under a thread that waits on them. Their other ends notice at once.
    pub(super) fn shutdown(&self) {
        for link in [&self.previous, &self.next].into_iter().chain(self.star.links()) {
            // Fails only where the connection is gone already.
            _ = link.stream.shutdown(Shutdown::Both);
        }
    }

    /// Fails if a connection in the ring is closed or broken. What lies in it stays there.
    pub(super) fn check(&self, during: Operation) -> Result<(), Error> {
        for link in [&self.previous, &self.next] {
            let lost = |source| Error::PeerLost { member_index: link.member_index, during, source };
            if unless_blocked(|| link.stream.peek(&mut [0])).map_err(lost)? == Some(0) {
                return Err(lost(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection")));
            }
        }
        Ok(())
    }

    /// Runs one collective. An error comes with where this member was in it.
    pub(super) fn run(
        &self,
        ours: Announcement,
        exchange: &mut impl Exchange,
        abort: &AbortHandle,
        deadline: Instant,
    ) -> Result<(), (Error, Stall)> {
        let mut transfer = Transfer {
            links: self,
            ours,
            header_out: encode_header(&ours),
            num_header_sent: 0,
            header_in: [0; HEADER_BYTES],
            num_header_received: 0,
            exchange,
            received_bytes: 0,
        };
        transfer.run(abort, deadline).map_err(|error| (error, transfer.stall()))
    }
}

/// A collective in progress: an announcement each way, then the exchange's data.
struct Transfer<'a, E> {
    links: &'a Links,
    ours: Announcement,
    header_out: [u8; HEADER_BYTES],
    num_header_sent: usize,
    header_in: [u8; HEADER_BYTES],
    num_header_received: usize,
    exchange: &'a mut E,
    received_bytes: u64,
}

impl<E: Exchange> Transfer<'_, E> {
    fn run(&mut self, abort: &AbortHandle, deadline: Instant) -> Result<(), Error> {
        loop {
            abort.check()?;
            if Instant::now() >= deadline {
                return Err(self.timeout());
            }
            // Receiving first: a neighbour's announcement explains more than the connection it closed afterwards.
            let has_received = self.receive()?;
            let has_sent = self.send()?;
            if self.is_sent() && self.is_received() {
                return Ok(());
            }
            if !has_received && !has_sent {
                self.wait(deadline)?;
            }
        }
    }

    /// Reads once. Returns whether anything came.
    fn receive(&mut self) -> Result<bool, Error> {
        let link = &self.links.previous;
        let in_header = self.num_header_received < HEADER_BYTES;
        let buffer = if in_header { &mut self.header_in[self.num_header_received..] } else { self.exchange.incoming() };
        if buffer.is_empty() {
            return Ok(false);
        }
        let Some(num_bytes) = try_read(&link.stream, buffer).map_err(|source| self.lost(link, source))? else { return Ok(false) };
        self.received_bytes += num_bytes as u64;
        if !in_header {
            self.exchange.received(num_bytes);
            return Ok(true);
        }
        self.num_header_received += num_bytes;
        if self.num_header_received == HEADER_BYTES {
            let theirs = decode_header(&self.header_in).map_err(|source| self.lost(link, source))?;
            if theirs != self.ours {
                return Err(Error::Mismatch { member_index: link.member_index, ours: self.ours, theirs });
            }
        }
        Ok(true)
    }

    /// Writes once. Returns whether anything went.
    fn send(&mut self) -> Result<bool, Error> {
        let link = &self.links.next;
        let in_header = self.num_header_sent < HEADER_BYTES;
        let bytes = if in_header { &self.header_out[self.num_header_sent..] } else { self.exchange.outgoing() };
        if bytes.is_empty() {
            return Ok(false);
        }
        let Some(num_bytes) = try_write(&link.stream, bytes).map_err(|source| self.lost(link, source))? else { return Ok(false) };
        match in_header {
            true => self.num_header_sent += num_bytes,
            false => self.exchange.sent(num_bytes),
        }
        Ok(true)
    }

    /// Waits until either link can go on.
    ///
    /// A link whose part is done is left alone: what happens there belongs to the next collective. The next member never sends anything, so
    /// its link becomes readable only by closing; that is noticed even while this member has nothing to send it.
    fn wait(&self, deadline: Instant) -> Result<(), Error> {
        let Links { previous, next, .. } = self.links;
        let has_outgoing = self.num_header_sent < HEADER_BYTES || !self.exchange.outgoing().is_empty();
        let towards_next = if has_outgoing { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let mut fds = [PollFd::new(&previous.stream, PollFlags::IN), PollFd::new(&next.stream, towards_next)];
        let waiting = match (self.is_received(), self.is_sent()) {
            (false, false) => &mut fds[..],
            (false, true) => &mut fds[..1],
            _ => &mut fds[1..],
        };
        wait(waiting, deadline).map_err(Error::io("wait for members"))?;
        let next_says = fds[1].revents();
        if next_says.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            let heard = try_read(&next.stream, &mut [0]).map_err(|source| self.lost(next, source))?;
            if heard.is_some() {
                return Err(self.lost(next, invalid("bytes against the direction of the ring")));
            }
        }
        Ok(())
    }

    fn is_sent(&self) -> bool {
        self.num_header_sent == HEADER_BYTES && self.exchange.is_sent()
    }

    fn is_received(&self) -> bool {
        self.num_header_received == HEADER_BYTES && self.exchange.is_received()
    }

    fn lost(&self, link: &Link, source: io::Error) -> Error {
        Error::PeerLost { member_index: link.member_index, during: self.ours.operation, source }
    }

    /// The neighbour this member waits for, and what has come from the one before it.
    fn stall(&self) -> Stall {
        let link = if self.is_received() { &self.links.next } else { &self.links.previous };
        Stall { waiting_for: link.member_index, received_bytes: self.received_bytes }
    }

    fn timeout(&self) -> Error {
        Error::Timeout { during: self.ours.operation, waiting_for: vec![self.stall().waiting_for] }
    }
}
