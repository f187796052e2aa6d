//! How members find each other and close the ring.
//!
//! 1. Everybody registers with member 0 and proves the key (`handshake`); the hello says where the member listens.
//! 2. When all have, member 0 sends everybody the table of addresses.
//! 3. Each member calls the next one in the ring, and answers the previous one, with the same proof.
//! 4. Each tells member 0 that both its links are up; when all have, member 0 tells everybody to go.
//!
//! Registrations stay open, for barriers (`star`), and from step 1 to 4 are watched: the death of any member ends the forming for all,
//! through member 0. Whoever fails says why before it leaves (`verdict`), so that the two ends of a broken connection name each other and
//! the rest nobody. Everything runs on the calling thread with sockets that do not block, so no stranger and no slow member can hold up
//! another, and an abort or the deadline ends it at once.

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
use super::star::Star;
use super::verdict::{VERDICT_BYTES, Verdict};
use super::wire::{ADDRESS_BYTES, Fields, invalid, put_address};
use super::{MEMBER_ZERO, Membership};
use crate::{AbortHandle, Error, OnAbort, Operation};

/// How long a caller may take to prove the key. A member needs two round trips.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Callers beyond the members who may be in their handshake at one time; the oldest is dropped to admit another.
const MAX_STRANGERS: usize = 64;

/// A member to member 0: both links are up.
const LINKED: u8 = 1;
/// Member 0 to everybody: where the members listen. The addresses follow.
const TABLE: u8 = 2;
/// Member 0 to everybody: all links are up.
const GO: u8 = 3;
/// Either way: the forming is over. A verdict follows.
const OVER: u8 = 4;

/// What whoever cannot be reached should look at.
const HINT: &str = "workers need open ports between them: see --advertise and --ports";

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
            line: None,
            stage: Stage::Table,
        }),
    };
    meet(&mut ring, &mut desk, &alarm, abort, deadline).map_err(|end| {
        desk.tell(end.verdict(&us), &mut ring.strangers);
        match end {
            End::Seen(error) => error,
            End::Overdue => desk.overdue(&ring),
            End::Told(verdict) => told(verdict, &ring),
        }
    })
}

/// Why the forming is over for this member.
enum End {
    /// By what it has met itself.
    Seen(Error),
    /// The deadline passed, here or where a member says so: they began within moments of each other.
    Overdue,
    /// By what another has said.
    Told(Verdict),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Seen(error)
    }
}

impl From<Verdict> for End {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Overdue { .. } => Self::Overdue,
            verdict => Self::Told(verdict),
        }
    }
}

impl End {
    /// What the others are told.
    fn verdict(&self, us: &Membership) -> Verdict {
        let by = us.member_index;
        match self {
            Self::Seen(error) => error.lost_member().map_or(Verdict::Left { by }, |whom| Verdict::Lost { by, whom }),
            Self::Overdue => Verdict::Overdue { by },
            Self::Told(verdict) => *verdict,
        }
    }
}

/// What another member's end of the forming means here. Who has lost this one is believed: then both name each other.
fn told(verdict: Verdict, ring: &RingSide<'_>) -> Error {
    let (reason, lost) = match verdict {
        Verdict::Lost { by, whom } if whom == ring.us.member_index => {
            (format!("member {by} has no connection with this worker at {} ({HINT})", ring.listener.advertised), Some(by))
        }
        Verdict::Lost { by, whom } => (format!("member {by} has no connection with member {whom}"), None),
        Verdict::Overdue { by } => (format!("the deadline of member {by} passed"), None),
        Verdict::Left { by } => (format!("member {by} left"), None),
    };
    Error::Unformed { reason, lost }
}

fn meet(ring: &mut RingSide<'_>, desk: &mut Desk, alarm: &Alarm, abort: &AbortHandle, deadline: Instant) -> Result<Links, End> {
    loop {
        abort.check()?;
        let now = Instant::now();
        if now >= deadline {
            return Err(End::Overdue);
        }
        // Who hangs up has said why to member 0: that says more than the call that broke.
        let registrations = ring.advance(now).map_err(|error| desk.heard(&ring.us).map_or(End::Seen(error), End::from))?;
        let is_formed = match desk {
            Desk::Host(host) => host.advance(ring, registrations)?,
            Desk::Registrant(registrant) => registrant.advance(ring)?,
        };
        if is_formed && let (Some(previous), Some(next), Some(star)) = (ring.previous.take(), ring.next.take(), desk.take_star()) {
            return Ok(Links {
                previous: Link { member_index: ring.us.previous(), stream: previous },
                next: Link { member_index: ring.us.next(), stream: next },
                star,
            });
        }
        // Members are few: after any event each connection is simply tried again.
        let mut fds = vec![PollFd::new(&alarm.ear, PollFlags::IN), PollFd::new(&ring.listener.socket, PollFlags::IN)];
        fds.extend(ring.strangers.iter().map(|stranger| stranger.answerer.channel.interest()));
        fds.extend(ring.call.iter().map(|call| call.caller.channel.interest()));
        match &*desk {
            Desk::Host(host) => fds.extend(host.registrants.values().map(|guest| guest.line.channel.interest())),
            Desk::Registrant(registrant) => {
                fds.extend(registrant.call.iter().map(|call| call.caller.channel.interest()));
                fds.extend(registrant.line.iter().map(|line| line.channel.interest()));
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
    call: Option<Call>,
    next: Option<TcpStream>,
    previous: Option<TcpStream>,
}

/// Somebody who has not proved the key yet.
struct Stranger {
    answerer: Answerer,
    address: SocketAddr,
    expires: Instant,
}

/// A call to another member.
struct Call {
    to: u32,
    address: SocketAddr,
    caller: Caller,
}

impl Call {
    /// Goes as far as it can without waiting. Returns whether both sides have proved the key.
    fn advance(&mut self, key: &Key) -> Result<bool, Error> {
        self.caller.advance(key).map_err(|error| match error {
            CallError::Lost(source) => self.failed(source),
            CallError::Refused(reason) => Error::Handshake { member_index: self.to, address: self.address, reason },
        })
    }

    fn failed(&self, source: io::Error) -> Error {
        unreachable(self.to, self.address, source)
    }
}

impl RingSide<'_> {
    /// Starts to call another member.
    fn call(&self, to: u32, address: SocketAddr, purpose: Purpose) -> Result<Call, Error> {
        let Membership { generation, member_index: from, num_members } = self.us;
        let stream = start_connect(address).map_err(|source| unreachable(to, address, source))?;
        let hello = Hello { purpose, generation, num_members, from, to, listener: self.listener.advertised };
        Ok(Call { to, address, caller: Caller::new(stream, &hello)? })
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
            match call.advance(self.key)? {
                true => self.next = Some(call.caller.channel.into_stream()),
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
    /// The registrations, when all is said on them.
    fn take_star(&mut self) -> Option<Star> {
        let link = |member_index, line: Line| Link { member_index, stream: line.channel.into_stream() };
        match self {
            Self::Host(host) => {
                let guests = std::mem::take(&mut host.registrants).into_iter();
                Some(Star::Hub(guests.map(|(index, guest)| link(index, guest.line)).collect()))
            }
            Self::Registrant(registrant) => registrant.line.take().map(|line| Star::Spoke(link(MEMBER_ZERO, line))),
        }
    }

    /// What has been said of the end, if anything has.
    fn heard(&mut self, us: &Membership) -> Option<Verdict> {
        let over = |message| match message {
            Ok(Some(Message::Over(verdict))) => Some(verdict),
            _ => None,
        };
        match self {
            Self::Host(host) => host.registrants.values_mut().find_map(|guest| over(guest.line.hear(us))),
            Self::Registrant(registrant) => registrant.line.as_mut().and_then(|line| over(line.hear(us))),
        }
    }

    /// Tells those who are there why this member leaves. Whoever cannot be told sees it leave.
    fn tell(&mut self, verdict: Verdict, strangers: &mut [Stranger]) {
        let message = [[OVER].as_slice(), &verdict.encode()].concat();
        let channels: Vec<&mut Channel> = match self {
            Self::Host(host) => {
                // Who has sent its proof takes itself for registered. To others than members it says nothing worth knowing.
                let registering = strangers.iter_mut().filter(|stranger| stranger.answerer.is_called_for(Purpose::Register));
                let guests = host.registrants.values_mut().map(|guest| &mut guest.line.channel);
                guests.chain(registering.map(|stranger| &mut stranger.answerer.channel)).collect()
            }
            Self::Registrant(registrant) => registrant.line.iter_mut().map(|line| &mut line.channel).collect(),
        };
        for channel in channels {
            _ = channel.send(&message);
        }
    }

    /// What the passing of the deadline means: for whom this member waits, if it waits for somebody and not only for what others wait for.
    fn overdue(&self, ring: &RingSide<'_>) -> Error {
        let registering = match self {
            Self::Registrant(registrant) => registrant.call.as_ref(),
            Self::Host(_) => None,
        };
        if let Some(call) = registering.or(ring.call.as_ref()) {
            return call.failed(io::Error::new(io::ErrorKind::TimedOut, "no answer until the deadline"));
        }
        let (at, num_members) = (ring.listener.advertised, ring.us.num_members);
        let is_called = match self {
            Self::Host(host) if !host.has_sent_table => {
                let missing: Vec<u32> = (1..num_members).filter(|index| !host.registrants.contains_key(index)).collect();
                let reason = format!("member(s) {missing:?} did not come to this worker at {at} before the deadline ({HINT})");
                return Error::Unformed { reason, lost: missing.first().copied() };
            }
            Self::Host(_) => true,
            Self::Registrant(registrant) => registrant.stage == Stage::Ring,
        };
        if is_called && ring.previous.is_none() {
            let previous = ring.us.previous();
            let reason = format!("member {previous} did not come to this worker at {at} before the deadline ({HINT})");
            return Error::Unformed { reason, lost: Some(previous) };
        }
        let whose = match self {
            Self::Host(host) => {
                let unlinked = host.registrants.iter().filter(|(_, guest)| !guest.is_linked).map(|(index, _)| index);
                format!("member(s) {:?}", unlinked.collect::<Vec<_>>())
            }
            Self::Registrant(_) => "all members".into(),
        };
        Error::Unformed { reason: format!("the deadline passed before {whose} had their connections"), lost: None }
    }
}

/// A registration: what a member and member 0 say to each other.
struct Line {
    channel: Channel,
    /// What the message is whose rest has not come yet.
    kind: Option<u8>,
}

/// What one hears on a registration.
enum Message {
    Linked,
    Table(Vec<u8>),
    Go,
    Over(Verdict),
}

impl Line {
    fn new(channel: Channel) -> Self {
        Self { channel, kind: None }
    }

    /// The next message, once all of it has come.
    fn hear(&mut self, us: &Membership) -> io::Result<Option<Message>> {
        let kind = match self.kind {
            Some(kind) => kind,
            None => match self.channel.receive(1)?.as_deref() {
                Some([kind]) => *self.kind.insert(*kind),
                _ => return Ok(None),
            },
        };
        let num_bytes = match kind {
            LINKED | GO => 0,
            TABLE => us.num_members as usize * ADDRESS_BYTES,
            OVER => VERDICT_BYTES,
            _ => return Err(invalid("an unknown message on a registration")),
        };
        let Some(rest) = self.channel.receive(num_bytes)? else { return Ok(None) };
        self.kind = None;
        Ok(Some(match kind {
            LINKED => Message::Linked,
            GO => Message::Go,
            TABLE => Message::Table(rest),
            _ => Message::Over(Verdict::decode(&rest)?),
        }))
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
    line: Line,
    listener: SocketAddr,
    is_linked: bool,
}

impl Host {
    /// Goes as far as it can without waiting. Returns whether the ring is closed and everybody has been told.
    fn advance(&mut self, ring: &mut RingSide<'_>, registrations: Vec<(Hello, Channel)>) -> Result<bool, End> {
        for (hello, channel) in registrations {
            if self.registrants.contains_key(&hello.from) {
                warn!(member = hello.from, "dropped a second registration of the same member");
                continue;
            }
            self.registrants.insert(hello.from, Guest { line: Line::new(channel), listener: hello.listener, is_linked: false });
        }
        for (index, guest) in &mut self.registrants {
            // After the go a member may say what is not for this loop.
            if !self.has_sent_go
                && let Some(verdict) = guest.listen(self.has_sent_table, &ring.us).map_err(|source| lost(*index, source))?
            {
                return Err(verdict.into());
            }
        }
        if !self.has_sent_table && self.registrants.len() + 1 == ring.us.num_members as usize {
            self.send_table(ring)?;
        }
        if !self.has_sent_go && self.has_sent_table && ring.is_linked() && self.registrants.values().all(|guest| guest.is_linked) {
            self.send_to_all(&[GO])?;
            self.has_sent_go = true;
        }
        let all_flushed = self.flush_all()?;
        Ok(self.has_sent_go && all_flushed)
    }

    fn send_table(&mut self, ring: &mut RingSide<'_>) -> Result<(), Error> {
        let mut table = Vec::with_capacity(1 + ring.us.num_members as usize * ADDRESS_BYTES);
        table.push(TABLE);
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
        self.registrants.iter_mut().try_for_each(|(index, guest)| guest.line.channel.send(message).map_err(|source| lost(*index, source)))
    }

    fn flush_all(&mut self) -> Result<bool, Error> {
        let mut all_flushed = true;
        for (index, guest) in &mut self.registrants {
            all_flushed &= guest.line.channel.flush().map_err(|source| lost(*index, source))?;
        }
        Ok(all_flushed)
    }
}

impl Guest {
    /// Reads what has come. Returns why the forming is over, if the guest says so.
    fn listen(&mut self, has_table: bool, us: &Membership) -> io::Result<Option<Verdict>> {
        while let Some(message) = self.line.hear(us)? {
            match message {
                Message::Over(verdict) => return Ok(Some(verdict)),
                Message::Linked if has_table && !self.is_linked => self.is_linked = true,
                _ => return Err(invalid("another message than was due of a member")),
            }
        }
        Ok(None)
    }
}

/// A member other than 0, registering.
struct Registrant {
    call: Option<Call>,
    line: Option<Line>,
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
    fn advance(&mut self, ring: &mut RingSide<'_>) -> Result<bool, End> {
        if let Some(mut call) = self.call.take() {
            match call.advance(ring.key)? {
                true => self.line = Some(Line::new(call.caller.channel)),
                false => self.call = Some(call),
            }
        }
        let Some(line) = &mut self.line else { return Ok(false) };
        let host_lost = |source| lost(MEMBER_ZERO, source);
        loop {
            match (line.hear(&ring.us).map_err(host_lost)?, self.stage) {
                (None, _) => break,
                (Some(Message::Over(verdict)), _) => return Err(verdict.into()),
                (Some(Message::Table(table)), Stage::Table) => {
                    let next = &table[ring.us.next() as usize * ADDRESS_BYTES..];
                    ring.call_next(Fields(next).address().map_err(host_lost)?)?;
                    self.stage = Stage::Ring;
                }
                (Some(Message::Go), Stage::Go) => return Ok(true),
                _ => return Err(host_lost(invalid("another message than was due of member 0")).into()),
            }
        }
        // After listening: member 0 may have said why it has closed the line on which this fails.
        if self.stage == Stage::Ring && ring.is_linked() {
            line.channel.send(&[LINKED]).map_err(host_lost)?;
            self.stage = Stage::Go;
        }
        line.channel.flush().map_err(host_lost)?;
        Ok(false)
    }
}

/// Whether accept(2) failed because of the connection that it took out of the queue: no concern of the other callers.
///
/// The caller has left again, or Linux hands on what the network has said of the connection meanwhile. What the system itself lacks, such
/// as file descriptors, is none of these.
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

fn unreachable(member_index: u32, address: SocketAddr, source: io::Error) -> Error {
    Error::Unreachable { member_index, address, source }
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
