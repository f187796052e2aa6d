//! The conformance suite on sockets, and what only sockets have: strangers, keys, forming.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::*;
use crate::conformance::ABORT_LATENCY;

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn listener() -> Listener {
    Listener::open(LOCAL, LOCAL, Ports::ANY).unwrap()
}

fn place(member_index: u32, num_members: u32) -> Membership {
    Membership { generation: 7, member_index, num_members }
}

/// Connects on a thread, as the member's process would.
fn start(bootstrap: &Bootstrap, us: Membership, listener: Listener, abort: &AbortHandle) -> JoinHandle<Result<TcpCollective, Error>> {
    let (bootstrap, abort) = (bootstrap.clone(), abort.clone());
    thread::spawn(move || TcpCollective::connect(&bootstrap, us, listener, abort, soon()))
}

fn start_all(at_zero: Listener, bootstrap: &Bootstrap, num_members: u32) -> Vec<JoinHandle<Result<TcpCollective, Error>>> {
    let mut at_zero = Some(at_zero);
    (0..num_members)
        .map(|index| start(bootstrap, place(index, num_members), at_zero.take().unwrap_or_else(listener), &AbortHandle::new()))
        .collect()
}

/// A whole world in this process.
pub(crate) fn members(num_members: u32) -> Vec<TcpCollective> {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    start_all(at_zero, &bootstrap, num_members).into_iter().map(|member| member.join().unwrap().unwrap()).collect()
}

fn world(num_members: u32) -> Vec<Box<dyn Collective>> {
    members(num_members).into_iter().map(|member| -> Box<dyn Collective> { Box::new(member) }).collect()
}

/// The connections of a member, to be looked at while it is used or after it is gone.
fn links(member: &TcpCollective) -> &Links {
    &member.ring.as_ref().unwrap().links
}

mod suite {
    crate::conformance_suite!(super::world, [1, 2, 3, 5]);
}

/// The next member's loss counts even when there is nothing to send it, and the previous member is alive but silent.
#[test]
fn a_loss_downstream_is_noticed_while_waiting_upstream() {
    let [_zero, mut one, two] = members(3).try_into().unwrap();
    let waiting = thread::spawn(move || one.all_reduce_sum(&mut [1.0; 3], soon()));
    // Its announcement and its own element: all that member 1 can send before it hears from member 0.
    let mut arrived = [0; wire::HEADER_BYTES + size_of::<f32>()];
    let from_one = &links(&two).previous.stream;
    while !matches!(from_one.peek(&mut arrived), Ok(count) if count == arrived.len()) {
        socket::wait(&mut [rustix::event::PollFd::new(from_one, rustix::event::PollFlags::IN)], soon()).unwrap();
    }
    let dropped_at = Instant::now();
    drop(two);
    let outcome = waiting.join().unwrap();
    assert!(matches!(outcome, Err(Error::PeerLost { member_index: 2, .. })), "{outcome:?}");
    assert!(dropped_at.elapsed() < ABORT_LATENCY);
}

/// Bytes that are no header of a collective are a lost peer, not a sum.
#[test]
fn a_stream_that_is_not_at_a_header_is_a_loss() {
    let [mut zero, one] = members(2).try_into().unwrap();
    (&links(&one).next.stream).write_all(&[0xff; 1000]).unwrap();
    let outcome = zero.all_reduce_sum(&mut [1.0; 100], soon());
    assert!(matches!(&outcome, Err(Error::PeerLost { source, .. }) if source.kind() == std::io::ErrorKind::InvalidData), "{outcome:?}");
}

#[test]
fn strangers_do_not_keep_the_members_from_forming() {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let call = || TcpStream::connect(at_zero.advertised()).unwrap();
    // They are in the queue before any member.
    let silent: Vec<_> = (0..100).map(|_| call()).collect();
    let garbage: Vec<_> = [vec![0u8; 3], vec![0xff; 10_000], b"GET / HTTP/1.1\r\n\r\n".to_vec(), b"peapod/2".to_vec()]
        .map(|bytes| {
            let mut stream = call();
            stream.write_all(&bytes).unwrap();
            stream
        })
        .into();
    drop(call());
    let began = Instant::now();
    for member in start_all(at_zero, &bootstrap, 3) {
        member.join().unwrap().unwrap();
    }
    assert!(began.elapsed() < Duration::from_secs(4), "strangers held the members up for {:?}", began.elapsed());
    for mut stream in silent.into_iter().chain(garbage) {
        // Dropped at the latest when the forming was over; a reset is how a socket with unread bytes is dropped.
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
}

/// Starts member 0 of two, lets `intruder` try to register as member 1, then the real member 1; returns what the intruder got.
fn intrude(intruder: impl FnOnce(&Bootstrap) -> (Bootstrap, Membership)) -> Error {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let zero = start(&bootstrap, place(0, 2), at_zero, &AbortHandle::new());
    let (their_bootstrap, their_place) = intruder(&bootstrap);
    let refusal = start(&their_bootstrap, their_place, listener(), &AbortHandle::new()).join().unwrap().unwrap_err();
    let one = start(&bootstrap, place(1, 2), listener(), &AbortHandle::new());
    assert!(zero.join().unwrap().is_ok() && one.join().unwrap().is_ok(), "the intruder kept the members from forming");
    refusal
}

#[test]
fn a_wrong_key_is_refused() {
    let refusal = intrude(|bootstrap| (Bootstrap { key: [0; 32], ..bootstrap.clone() }, place(1, 2)));
    assert!(matches!(refusal, Error::Handshake { member_index: 0, .. }), "{refusal:?}");
}

#[test]
fn another_generation_is_refused() {
    let refusal = intrude(|bootstrap| (bootstrap.clone(), Membership { generation: 6, ..place(1, 2) }));
    assert!(matches!(refusal, Error::Handshake { member_index: 0, .. }), "{refusal:?}");
}

#[test]
fn another_world_size_is_refused() {
    let refusal = intrude(|bootstrap| (bootstrap.clone(), place(1, 3)));
    assert!(matches!(refusal, Error::Handshake { member_index: 0, .. }), "{refusal:?}");
}

/// A caller who speaks the protocol but has no key learns a nonce and a digest, and is dropped for its answer.
#[test]
fn a_caller_that_cannot_prove_the_key_is_dropped() {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let abort = AbortHandle::new();
    let address = at_zero.advertised();
    let zero = start(&bootstrap, place(0, 2), at_zero, &abort);
    let mut stream = TcpStream::connect(address).unwrap();
    let mut hello = b"peapod/2\x01".to_vec();
    hello.extend_from_slice(&7u64.to_le_bytes());
    for number in [2u32, 1, 0] {
        hello.extend_from_slice(&number.to_le_bytes());
    }
    wire::put_address(&mut hello, address);
    hello.extend_from_slice(&[5; 32]);
    stream.write_all(&hello).unwrap();
    let mut challenge = [0; 64];
    stream.read_exact(&mut challenge).unwrap();
    // The answerer's own digest, sent back, is not the caller's.
    stream.write_all(&challenge[32..]).unwrap();
    assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    abort.abort("done");
    assert!(matches!(zero.join().unwrap(), Err(Error::Aborted { .. })));
}

#[test]
fn an_abort_breaks_the_rendezvous() {
    let (at_zero, abort) = (listener(), [AbortHandle::new(), AbortHandle::new()]);
    let bootstrap = at_zero.bootstrap().unwrap();
    let ends = mpsc::channel();
    let members = [(0, at_zero), (1, listener())].map(|(index, listener)| {
        let (bootstrap, abort, end) = (bootstrap.clone(), abort[index as usize].clone(), ends.0.clone());
        thread::spawn(move || {
            let outcome = TcpCollective::connect(&bootstrap, place(index, 3), listener, abort, soon());
            end.send(Instant::now()).unwrap();
            outcome
        })
    });
    let aborted_at = Instant::now();
    abort.iter().for_each(|abort| abort.abort("member 2 died"));
    for _ in 0..2 {
        let latency = ends.1.recv().unwrap().saturating_duration_since(aborted_at);
        assert!(latency < ABORT_LATENCY, "returned {latency:?} after the abort");
    }
    let [zero, one] = members.map(|member| member.join().unwrap().unwrap_err());
    assert!(matches!(&zero, Error::Aborted { reason } if reason == "member 2 died"), "{zero:?}");
    // Member 0 may have hung up before the second abort.
    assert!(matches!(one, Error::Aborted { .. } | Error::Unformed { .. } | Error::Handshake { .. } | Error::Unreachable { .. }), "{one:?}");
}

/// A member whose steps the test makes.
struct Puppet {
    channel: handshake::Channel,
    listener: Listener,
}

impl Puppet {
    /// Registers with member 0.
    fn register(bootstrap: &Bootstrap, us: Membership) -> Self {
        let Membership { generation, member_index: from, num_members } = us;
        let listener = listener();
        let hello = handshake::Hello {
            purpose: handshake::Purpose::Register,
            generation,
            num_members,
            from,
            to: 0,
            listener: listener.advertised(),
        };
        let mut caller = handshake::Caller::new(socket::start_connect(bootstrap.address()).unwrap(), &hello).unwrap();
        while !caller.advance(&bootstrap.key).unwrap() {
            socket::wait(&mut [caller.channel.interest()], soon()).unwrap();
        }
        Self { channel: caller.channel, listener }
    }

    /// Waits for the addresses of the others: then all have registered.
    fn await_table(&mut self, num_members: usize) {
        while self.channel.receive(1 + num_members * wire::ADDRESS_BYTES).unwrap().is_none() {
            socket::wait(&mut [self.channel.interest()], soon()).unwrap();
        }
    }

    /// Waits until somebody calls, and lets it wait.
    fn await_call(&self) -> TcpStream {
        loop {
            match self.listener.socket.accept() {
                Ok((stream, _)) => return stream,
                Err(_) => {
                    socket::wait(&mut [rustix::event::PollFd::new(&self.listener.socket, rustix::event::PollFlags::IN)], soon()).unwrap()
                }
            }
        }
    }

    fn say(&mut self, verdict: verdict::Verdict) {
        self.channel.send(&[[4].as_slice(), &verdict.encode()].concat()).unwrap();
    }
}

fn errors<const N: usize>(members: [JoinHandle<Result<TcpCollective, Error>>; N]) -> [Error; N] {
    members.map(|member| member.join().unwrap().unwrap_err())
}

/// A member that dies after it has registered, while another has not come yet, ends the forming for all.
#[test]
fn a_death_while_forming_fails_all() {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let zero = start(&bootstrap, place(0, 4), at_zero, &AbortHandle::new());
    let two = start(&bootstrap, place(2, 4), listener(), &AbortHandle::new());
    drop(Puppet::register(&bootstrap, place(1, 4)));
    let [zero, two] = errors([zero, two]);
    assert!(matches!(zero, Error::PeerLost { member_index: 1, during: Operation::Rendezvous, .. }), "{zero:?}");
    // Depending on how far member 2 had come when member 0 hung up.
    match &two {
        Error::Unformed { reason, lost: None } => assert_eq!(reason, "member 0 has no connection with member 1"),
        Error::Handshake { member_index: 0, .. } | Error::Unreachable { member_index: 0, .. } => {}
        other => panic!("{other:?}"),
    }
}

/// The ends of a connection that cannot be made name each other, so that whoever counts such losses finds the pair; the rest name nobody.
#[test]
fn a_refused_call_is_told_to_the_one_called_and_blamed_on_nobody_else() {
    let closed = listener().advertised();
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let mut listeners = [at_zero, listener(), Listener { advertised: closed, ..listener() }, listener()].into_iter();
    let members = [0, 1, 2, 3].map(|index| start(&bootstrap, place(index, 4), listeners.next().unwrap(), &AbortHandle::new()));
    let [zero, one, two, three] = errors(members);
    assert!(matches!(&one, Error::Unreachable { member_index: 2, address, .. } if *address == closed), "{one:?}");
    assert!(one.to_string().starts_with(&format!("could not reach member 2 at {closed} (")), "{one}");
    assert_eq!([&zero, &one, &two, &three].map(Error::lost_member), [None, Some(2), Some(1), None], "{zero:?} {two:?} {three:?}");
    assert!(two.to_string().contains(&format!("member 1 has no connection with this worker at {closed}")), "{two}");
    for other in [zero, three] {
        assert!(other.to_string().ends_with("member 1 has no connection with member 2"), "{other}");
    }
}

/// Packets that a firewall drops: at the deadline, whosever comes first, a member that lacks a link says with whom.
#[test]
fn at_the_deadline_of_another_a_member_names_whom_it_calls_in_vain() {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let zero = start(&bootstrap, place(0, 3), at_zero, &AbortHandle::new());
    let one = start(&bootstrap, place(1, 3), listener(), &AbortHandle::new());
    let mut two = Puppet::register(&bootstrap, place(2, 3));
    let _unanswered = two.await_call();
    two.say(verdict::Verdict::Overdue { by: 2 });
    let [_, one] = errors([zero, one]);
    let address = two.listener.advertised();
    assert!(matches!(&one, Error::Unreachable { member_index: 2, address: at, .. } if *at == address), "{one:?}");
}

#[test]
fn at_the_deadline_of_another_a_member_names_who_has_not_called_it() {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let zero = start(&bootstrap, place(0, 2), at_zero, &AbortHandle::new());
    let mut one = Puppet::register(&bootstrap, place(1, 2));
    let mut link = handshake::Answerer::new(socket::configure(one.await_call()).unwrap());
    while link.advance(&bootstrap.key, &place(1, 2)).unwrap().is_none() {
        socket::wait(&mut [link.channel.interest()], soon()).unwrap();
    }
    one.say(verdict::Verdict::Overdue { by: 1 });
    let [zero] = errors([zero]);
    let Error::Unformed { reason, lost: Some(1) } = &zero else { panic!("{zero:?}") };
    assert!(reason.starts_with(&format!("member 1 did not come to this worker at {} before", bootstrap.address())), "{reason}");
}

#[test]
fn a_member_that_is_aborted_is_not_taken_for_lost() {
    let (at_zero, abort) = (listener(), AbortHandle::new());
    let bootstrap = at_zero.bootstrap().unwrap();
    let zero = start(&bootstrap, place(0, 3), at_zero, &AbortHandle::new());
    let one = start(&bootstrap, place(1, 3), listener(), &abort);
    let mut two = Puppet::register(&bootstrap, place(2, 3));
    two.await_table(3);
    abort.abort("the job stops");
    let [zero, one] = errors([zero, one]);
    assert!(matches!(&one, Error::Aborted { .. }), "{one:?}");
    assert!(matches!(&zero, Error::Unformed { reason, lost: None } if reason == "member 1 left"), "{zero:?}");
}

#[test]
fn the_deadline_of_member_zero_names_the_members_that_never_came() {
    let at_zero = listener();
    let bootstrap = at_zero.bootstrap().unwrap();
    let deadline = Instant::now() + Duration::from_millis(50);
    let outcome = TcpCollective::connect(&bootstrap, place(0, 3), at_zero, AbortHandle::new(), deadline);
    let Err(Error::Unformed { reason, lost: Some(1) }) = outcome else { panic!("{outcome:?}") };
    assert!(reason.starts_with(&format!("member(s) [1, 2] did not come to this worker at {} before", bootstrap.address())), "{reason}");
}

#[test]
fn nobody_listening_is_a_member_that_cannot_be_reached() {
    let gone = listener();
    let bootstrap = gone.bootstrap().unwrap();
    drop(gone);
    let outcome = start(&bootstrap, place(1, 2), listener(), &AbortHandle::new()).join().unwrap();
    assert!(matches!(&outcome, Err(Error::Unreachable { member_index: 0, address, .. }) if *address == bootstrap.address()), "{outcome:?}");
}

#[test]
fn arguments_that_do_not_fit_are_refused() {
    let refused = |us: Membership, foreign: bool| {
        let at_zero = listener();
        let bootstrap = at_zero.bootstrap().unwrap();
        let listener = if foreign { listener() } else { at_zero };
        let outcome = TcpCollective::connect(&bootstrap, us, listener, AbortHandle::new(), soon());
        matches!(outcome, Err(Error::InvalidArgument { .. }))
    };
    assert!(refused(place(2, 2), true));
    assert!(refused(place(0, 0), true));
    assert!(refused(place(0, 2), true));
    assert!(refused(place(1, 2), false));
}
