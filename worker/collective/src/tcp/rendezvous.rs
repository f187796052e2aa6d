//! How members find each other and close the ring.
//!
//! 1. Everybody registers with member 0 and proves the key (`handshake`); the hello says where the member listens.
//! 2. When all have, member 0 sends everybody the table of addresses.
//! 3. Each member calls the next one in the ring, and answers the previous one, with the same proof.
//! 4. Each tells member 0 that both its links are up; when all have, member 0 tells everybody to go.
//!
//! Registrations stay open from step 1 to 4 and are watched: the death of any member ends the forming for all, through member 0. Everything
//! runs on the calling thread with sockets that do not block, so no stranger and no slow member can hold up another, and an abort or the
//! deadline ends it at once.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::bootstrap::{Bootstrap, Key, Listener};
use super::handshake::{Answerer, CallError, Caller, Channel, Hello, Purpose};
use super::links::{Link, Links};
use super::socket::{configure, start_connect, unless_blocked, wait};
use super::wire::{ADDRESS_BYTES, Fields, invalid, put_address};
use super::{MEMBER_ZERO, Membership};
use crate::{AbortHandle, Error, OnAbort, Operation};

/// How long a caller may take to prove the key. A member needs two round trips.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Callers beyond the members who may be in their handshake at one time; the oldest is dropped to admit another.
const MAX_STRANGERS: usize = 64;

/// A member to member 0: both links are up.
const LINKED: u8 = 1;
/// Member 0 to everybody: all links are up.
const GO: u8 = 2;

/// Forms the ring of a membership with at least two members.
pub(super) fn form(
    bootstrap: &Bootstrap,
    us: Membership,
    listener: &Listener,
    abort: &AbortHandle,
    deadline: Instant,
) -> Result<Links, Error> {
    let alarm = Alarm::new(abort)?;
    let mut ring = RingSide { us, key: &bootstrap.key, listener, strangers: Vec::new(), call: None, next: None, previous: None };
    let mut desk = match us.member_index {
        MEMBER_ZERO => Desk::Host(Host { registrants: BTreeMap::new(), has_sent_table: false, has_sent_go: false }),
        _ => Desk::Registrant(Registrant {
            call: Some(ring.call(MEMBER_ZERO, bootstrap.address, Purpose::Register)?),
            channel: None,
            stage: Stage::Table,
        }),
    };
    loop {
        abort.check()?;
        let now = Instant::now();
        if now >= deadline {
            return Err(Error::Timeout { during: Operation::Rendezvous, waiting_for: desk.missing(&ring) });
        }
        let registrations = ring.advance(now)?;
        let is_formed = match &mut desk {
            Desk::Host(host) => host.advance(&mut ring, registrations)?,
            Desk::Registrant(registrant) => registrant.advance(&mut ring)?,
        };
        if is_formed && let (Some(previous), Some(next)) = (ring.previous.take(), ring.next.take()) {
            return Ok(Links {
                previous: Link { member_index: us.previous(), stream: previous },
                next: Link { member_index: us.next(), stream: next },
            });
        }
        // Members are few: after any event each connection is simply tried again.
        let mut fds = vec![PollFd::new(&alarm.ear, PollFlags::IN), PollFd::new(&listener.socket, PollFlags::IN)];
        fds.extend(ring.strangers.iter().map(|stranger| stranger.answerer.channel.interest()));
        fds.extend(ring.call.iter().map(|call| call.channel.interest()));
        match &desk {
            Desk::Host(host) => fds.extend(host.registrants.values().map(|guest| guest.channel.interest())),
            Desk::Registrant(registrant) => {
                fds.extend(registrant.call.iter().map(|call| call.channel.interest()));
                fds.extend(registrant.channel.iter().map(Channel::interest));
            }
        }
        let wake_at = ring.strangers.iter().map(|stranger| stranger.expires).min().map_or(deadline, |expires| expires.min(deadline));
        wait(&mut fds, wake_at).map_err(Error::io("wait for members"))?;
    }
}

/// A file descriptor that becomes readable when the abort comes, for a wait on sockets that come and go.
struct Alarm {
    ear: UnixStream,
    _bell: OnAbort,
}

impl Alarm {
    fn new(abort: &AbortHandle) -> Result<Self, Error> {
        let (ear, bell) = UnixStream::pair().map_err(Error::io("make a socket pair"))?;
        // Closing one end makes the other readable for good.
        let bell = abort.on_abort(move || drop(bell));
        Ok(Self { ear, _bell: bell })
    }
}

/// What every member does: answer callers, and call its next member.
struct RingSide<'a> {
    us: Membership,
    key: &'a Key,
    listener: &'a Listener,
    strangers: Vec<Stranger>,
    call: Option<Caller>,
    next: Option<TcpStream>,
    previous: Option<TcpStream>,
}

/// Somebody who has not proved the key yet.
struct Stranger {
    answerer: Answerer,
    address: SocketAddr,
    expires: Instant,
}

impl RingSide<'_> {
    /// Starts to call another member.
    fn call(&self, to: u32, address: SocketAddr, purpose: Purpose) -> Result<Caller, Error> {
        let Membership { generation, member_index: from, num_members } = self.us;
        let stream = start_connect(address).map_err(|source| lost(to, source))?;
        Caller::new(stream, &Hello { purpose, generation, num_members, from, to, listener: self.listener.advertised })
    }

    fn call_next(&mut self, address: SocketAddr) -> Result<(), Error> {
        self.call = Some(self.call(self.us.next(), address, Purpose::Ring)?);
        Ok(())
    }

    fn is_linked(&self) -> bool {
        self.previous.is_some() && self.next.is_some()
    }

    /// Goes as far as it can without waiting. Returns the members that have newly registered here.
    fn advance(&mut self, now: Instant) -> Result<Vec<(Hello, Channel)>, Error> {
        if let Some(mut call) = self.call.take() {
            match call.advance(self.key).map_err(|error| call_failed(self.us.next(), error))? {
                true => self.next = Some(call.channel.into_stream()),
                false => self.call = Some(call),
            }
        }
        self.accept(now)?;
        let mut registrations = Vec::new();
        for mut stranger in std::mem::take(&mut self.strangers) {
            match stranger.answerer.advance(self.key, &self.us) {
                Ok(None) if now < stranger.expires => self.strangers.push(stranger),
                Ok(None) => warn!(caller = %stranger.address, "dropped a caller that did not prove the key in time"),
                Ok(Some(hello)) if hello.purpose == Purpose::Register => registrations.push((hello, stranger.answerer.channel)),
                Ok(Some(_)) if self.previous.is_none() => self.previous = Some(stranger.answerer.channel.into_stream()),
                Ok(Some(hello)) => warn!(caller = %stranger.address, member = hello.from, "dropped a second link from the same member"),
                Err(error) => warn!(caller = %stranger.address, %error, "dropped a caller"),
            }
        }
        Ok(registrations)
    }

    fn accept(&mut self, now: Instant) -> Result<(), Error> {
        let capacity = MAX_STRANGERS.saturating_add(self.us.num_members as usize);
        loop {
            let stream = match unless_blocked(|| self.listener.socket.accept()) {
                Ok(None) => return Ok(()),
                Ok(Some((stream, address))) => configure(stream).map(|stream| (stream, address)),
                Err(error) if concerns_one_caller(&error) => {
                    debug!(%error, "a caller could not be accepted");
                    continue;
                }
                Err(source) => return Err(Error::Io { doing: "accept a member", source }),
            };
            match stream {
                Ok((stream, address)) => {
                    if self.strangers.len() >= capacity {
                        let oldest = self.strangers.remove(0);
                        warn!(caller = %oldest.address, "dropped the caller that has been in its handshake for longest: too many at once");
                    }
                    self.strangers.push(Stranger { answerer: Answerer::new(stream), address, expires: now + HANDSHAKE_TIMEOUT });
                }
                Err(error) => debug!(%error, "dropped a caller whose socket cannot be configured"),
            }
        }
    }
}

/// This member's side of the registration.
enum Desk {
    Host(Host),
    Registrant(Registrant),
}

impl Desk {
    /// Whom the forming waits for, as far as is known here.
    fn missing(&self, ring: &RingSide<'_>) -> Vec<u32> {
        let others = 1..ring.us.num_members;
        let mut missing: Vec<u32> = match self {
            Self::Host(host) if !host.has_sent_table => others.filter(|index| !host.registrants.contains_key(index)).collect(),
            Self::Host(host) => host.registrants.iter().filter(|(_, guest)| !guest.is_linked).map(|(index, _)| *index).collect(),
            Self::Registrant(Registrant { stage: Stage::Ring, .. }) => {
                let next = ring.next.is_none().then(|| ring.us.next());
                let previous = ring.previous.is_none().then(|| ring.us.previous());
                previous.into_iter().chain(next).collect()
            }
            Self::Registrant(_) => vec![MEMBER_ZERO],
        };
        missing.sort_unstable();
        missing.dedup();
        missing
    }
}

/// Member 0, with whom the others register.
struct Host {
    registrants: BTreeMap<u32, Guest>,
    has_sent_table: bool,
    has_sent_go: bool,
}

/// A registered member, as member 0 sees it.
struct Guest {
    channel: Channel,
    listener: SocketAddr,
    is_linked: bool,
}

impl Host {
    /// Goes as far as it can without waiting. Returns whether the ring is closed and everybody has been told.
    fn advance(&mut self, ring: &mut RingSide<'_>, registrations: Vec<(Hello, Channel)>) -> Result<bool, Error> {
        for (hello, channel) in registrations {
            if self.registrants.contains_key(&hello.from) {
                warn!(member = hello.from, "dropped a second registration of the same member");
                continue;
            }
            self.registrants.insert(hello.from, Guest { channel, listener: hello.listener, is_linked: false });
        }
        let mut all_flushed = true;
        for (index, guest) in &mut self.registrants {
            all_flushed &= guest.advance(self.has_sent_table).map_err(|source| lost(*index, source))?;
        }
        if !self.has_sent_table && self.registrants.len() + 1 == ring.us.num_members as usize {
            self.send_table(ring)?;
        }
        if !self.has_sent_go && self.has_sent_table && ring.is_linked() && self.registrants.values().all(|guest| guest.is_linked) {
            self.send_to_all(&[GO])?;
            self.has_sent_go = true;
            return self.flush_all();
        }
        Ok(self.has_sent_go && all_flushed)
    }

    fn send_table(&mut self, ring: &mut RingSide<'_>) -> Result<(), Error> {
        let mut table = Vec::with_capacity(ring.us.num_members as usize * ADDRESS_BYTES);
        put_address(&mut table, ring.listener.advertised);
        for guest in self.registrants.values() {
            put_address(&mut table, guest.listener);
        }
        self.send_to_all(&table)?;
        self.has_sent_table = true;
        match self.registrants.get(&ring.us.next()) {
            Some(next) => ring.call_next(next.listener),
            // Not reachable: all others are registered. Waiting until the deadline would be the only harm.
            None => Ok(()),
        }
    }

    fn send_to_all(&mut self, message: &[u8]) -> Result<(), Error> {
        self.registrants.iter_mut().try_for_each(|(index, guest)| guest.channel.send(message).map_err(|source| lost(*index, source)))
    }

    fn flush_all(&mut self) -> Result<bool, Error> {
        let mut all_flushed = true;
        for (index, guest) in &mut self.registrants {
            all_flushed &= guest.channel.flush().map_err(|source| lost(*index, source))?;
        }
        Ok(all_flushed)
    }
}

impl Guest {
    /// Reads what has come. Returns whether everything for the guest is sent.
    fn advance(&mut self, has_table: bool) -> io::Result<bool> {
        if !has_table || self.is_linked {
            self.channel.expect_silence()?;
        } else if let Some(message) = self.channel.receive(1)? {
            if message != [LINKED] {
                return Err(invalid("another message where a member's links were due"));
            }
            self.is_linked = true;
        }
        self.channel.flush()
    }
}

/// A member other than 0, registering.
struct Registrant {
    call: Option<Caller>,
    channel: Option<Channel>,
    stage: Stage,
}

/// What a registrant waits for once registered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The others' addresses.
    Table,
    /// Its own links.
    Ring,
    /// The others' links.
    Go,
}

impl Registrant {
    /// Goes as far as it can without waiting. Returns whether the ring is closed.
    fn advance(&mut self, ring: &mut RingSide<'_>) -> Result<bool, Error> {
        if let Some(mut call) = self.call.take() {
            match call.advance(ring.key).map_err(|error| call_failed(MEMBER_ZERO, error))? {
                true => self.channel = Some(call.channel),
                false => self.call = Some(call),
            }
        }
        let Some(channel) = &mut self.channel else { return Ok(false) };
        let host_lost = |source| lost(MEMBER_ZERO, source);
        channel.flush().map_err(host_lost)?;
        if self.stage == Stage::Table {
            let Some(table) = channel.receive(ring.us.num_members as usize * ADDRESS_BYTES).map_err(host_lost)? else { return Ok(false) };
            let next = &table[ring.us.next() as usize * ADDRESS_BYTES..];
            ring.call_next(Fields(next).address().map_err(host_lost)?)?;
            self.stage = Stage::Ring;
        }
        if self.stage == Stage::Ring {
            if !ring.is_linked() {
                channel.expect_silence().map_err(host_lost)?;
                return Ok(false);
            }
            channel.send(&[LINKED]).map_err(host_lost)?;
            self.stage = Stage::Go;
        }
        match channel.receive(1).map_err(host_lost)?.as_deref() {
            None => Ok(false),
            Some([GO]) => Ok(true),
            Some(_) => Err(host_lost(invalid("another message where the go was due"))),
        }
    }
}

/// Whether accept(2) failed because of the connection that it took out of the queue: no concern of the other callers.
///
/// The caller has left again, or Linux hands on what the network has said of the connection meanwhile. What the system itself lacks, such as
/// file descriptors, is none of these.
fn concerns_one_caller(error: &io::Error) -> bool {
    const OF_THE_CONNECTION: [Errno; 10] = [
        Errno::CONNABORTED,
        Errno::NETDOWN,
        Errno::PROTO,
        Errno::NOPROTOOPT,
        Errno::HOSTDOWN,
        Errno::NONET,
        Errno::HOSTUNREACH,
        Errno::OPNOTSUPP,
        Errno::NETUNREACH,
        // A firewall's rule.
        Errno::PERM,
    ];
    Errno::from_io_error(error).is_some_and(|errno| OF_THE_CONNECTION.contains(&errno))
}

fn lost(member_index: u32, source: io::Error) -> Error {
    Error::PeerLost { member_index, during: Operation::Rendezvous, source }
}

fn call_failed(member_index: u32, error: CallError) -> Error {
    match error {
        CallError::Lost(source) => lost(member_index, source),
        CallError::Refused(reason) => Error::Handshake { member_index, reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are Linux's: those that its manual page of accept lists as to be tried again, then those that are not.
    #[test]
    fn what_the_network_says_of_one_caller_is_no_error_of_the_listener() {
        for code in [103, 100, 71, 92, 112, 64, 113, 95, 101, 1] {
            let error = io::Error::from_raw_os_error(code);
            assert!(concerns_one_caller(&error), "{error}");
        }
        for code in [24, 23, 12, 105, 9, 22] {
            let error = io::Error::from_raw_os_error(code);
            assert!(!concerns_one_caller(&error), "{error}");
        }
        assert!(!concerns_one_caller(&invalid("no number of the system's")));
    }
}
