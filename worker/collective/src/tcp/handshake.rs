//! Proving to each other, on every connection, that both ends hold the generation's key.
//!
//! ```text
//! caller   -> answerer   Hello      what for, generation, from whom to whom, the caller's listener, nonce
//! answerer -> caller     Challenge  nonce, HMAC(key, "answerer" | Hello | answerer's nonce)
//! caller   -> answerer   Proof      HMAC(key, "caller" | Hello | answerer's nonce)
//! ```
//!
//! HMAC-SHA256. Both nonces are 32 fresh random bytes, so nothing can be replayed; the labels keep one side's proof from serving as the
//! other's. Data is not encrypted or authenticated afterwards: the network between workers is trusted not to alter packets, but not to keep
//! strangers from connecting.

use std::io;
use std::net::{SocketAddr, TcpStream};

use hmac::digest::Key as HmacKey;
use hmac::{Hmac, KeyInit, Mac};
use rustix::event::{PollFd, PollFlags};
use sha2::Sha256;

use super::Membership;
use super::bootstrap::{KEY_BYTES, Key, random_bytes};
use super::socket::{try_read, try_write};
use super::wire::{ADDRESS_BYTES, Fields, invalid, put_address};
use crate::Error;

const MAGIC: [u8; 8] = *b"peapod/2";
const NONCE_BYTES: usize = 32;
const TAG_BYTES: usize = 32;
const HELLO_BYTES: usize = MAGIC.len() + 1 + 8 + 3 * 4 + ADDRESS_BYTES + NONCE_BYTES;
const CHALLENGE_BYTES: usize = NONCE_BYTES + TAG_BYTES;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To tell member 0 where one listens and learn where the others do.
    Register,
    /// To be the link to the next member of the ring.
    Ring,
}

/// A caller's introduction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) purpose: Purpose,
    pub(super) generation: u64,
    pub(super) num_members: u32,
    pub(super) from: u32,
    pub(super) to: u32,
    /// Where the caller itself listens.
    pub(super) listener: SocketAddr,
}

impl Hello {
    fn encode(&self, nonce: &[u8; NONCE_BYTES]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HELLO_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.push(match self.purpose {
            Purpose::Register => 1,
            Purpose::Ring => 2,
        });
        bytes.extend_from_slice(&self.generation.to_le_bytes());
        for number in [self.num_members, self.from, self.to] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        put_address(&mut bytes, self.listener);
        bytes.extend_from_slice(nonce);
        bytes
    }

    fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut fields = Fields(bytes);
        if fields.take()? != MAGIC {
            return Err(invalid("not a member of this program's version"));
        }
        let purpose = match fields.byte()? {
            1 => Purpose::Register,
            2 => Purpose::Ring,
            _ => return Err(invalid("unknown purpose")),
        };
        let (generation, num_members, from, to) = (fields.u64()?, fields.u32()?, fields.u32()?, fields.u32()?);
        Ok(Self { purpose, generation, num_members, from, to, listener: fields.address()? })
    }

    /// Refuses a caller that `us` expects nothing from.
    fn check(&self, us: &Membership) -> io::Result<()> {
        let expected_from = match self.purpose {
            Purpose::Register => us.member_index == 0 && (1..us.num_members).contains(&self.from),
            Purpose::Ring => self.from == us.previous(),
        };
        match () {
            () if self.generation != us.generation => Err(invalid("another generation")),
            () if self.num_members != us.num_members => Err(invalid("another number of members")),
            () if self.to != us.member_index || !expected_from => Err(invalid("not a caller this member expects")),
            () => Ok(()),
        }
    }
}

/// The keyed digest of one side's claim.
fn claim(key: &Key, side: &'static str, hello: &[u8], answerer_nonce: &[u8]) -> Hmac<Sha256> {
    // HMAC pads a short key with zeros to its block; done here, there is no length left that could be refused.
    let mut padded = HmacKey::<Hmac<Sha256>>::default();
    padded[..KEY_BYTES].copy_from_slice(key);
    // The fields behind the label have fixed lengths and no label begins another: no two claims have the same bytes.
    Hmac::<Sha256>::new(&padded).chain_update(side).chain_update(hello).chain_update(answerer_nonce)
}

const ANSWERER: &str = "answerer";
const CALLER: &str = "caller";

/// A connection on which short messages of known length are exchanged without blocking.
#[derive(Debug)]
pub(super) struct Channel {
    stream: TcpStream,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
}

impl Channel {
    /// Wraps a stream that does not block.
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, inbox: Vec::new(), outbox: Vec::new() }
    }

    /// Sends `message`, as much as goes now; [`flush`](Self::flush) sends the rest.
    pub(super) fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.outbox.extend_from_slice(message);
        self.flush().map(drop)
    }

    /// Sends what is waiting. Returns whether nothing waits any more.
    pub(super) fn flush(&mut self) -> io::Result<bool> {
        while !self.outbox.is_empty() {
            match try_write(&self.stream, &self.outbox)? {
                Some(num_bytes) => drop(self.outbox.drain(..num_bytes)),
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Returns the next message once all of its `num_bytes` have arrived. Never reads beyond it: what follows may be a collective's.
    pub(super) fn receive(&mut self, num_bytes: usize) -> io::Result<Option<Vec<u8>>> {
        let mut filled = self.inbox.len();
        self.inbox.resize(num_bytes, 0);
        while filled < num_bytes {
            match try_read(&self.stream, &mut self.inbox[filled..]) {
                Ok(Some(count)) => filled += count,
                outcome => {
                    self.inbox.truncate(filled);
                    return outcome.map(|_| None);
                }
            }
        }
        Ok(Some(std::mem::take(&mut self.inbox)))
    }

    /// What to wait for before looking at this channel again.
    pub(super) fn interest(&self) -> PollFd<'_> {
        let flags = if self.outbox.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        PollFd::new(&self.stream, flags)
    }

    /// Hands the stream on. Nothing is lost: `receive` takes no more than was asked for.
    pub(super) fn into_stream(self) -> TcpStream {
        self.stream
    }
}

/// The calling side of a handshake.
#[derive(Debug)]
pub(super) struct Caller {
    pub(super) channel: Channel,
    hello: Vec<u8>,
    has_answer: bool,
}

/// Why a call failed.
#[derive(Debug)]
pub(super) enum CallError {
    /// The connection could not be made, or broke.
    Lost(io::Error),
    /// The other side hung up on the hello, or could not prove that it holds the key.
    Refused(String),
}

impl Caller {
    /// Introduces this member on a connection that may still be under way.
    pub(super) fn new(stream: TcpStream, hello: &Hello) -> Result<Self, Error> {
        let mut channel = Channel::new(stream);
        let hello = hello.encode(&random_bytes()?);
        channel.outbox.extend_from_slice(&hello);
        Ok(Self { channel, hello, has_answer: false })
    }

    /// Goes as far as it can without waiting. Returns whether both sides have proved the key, as seen from here.
    pub(super) fn advance(&mut self, key: &Key) -> Result<bool, CallError> {
        // A connection that cannot be made shows here; past this point somebody is there.
        if !self.channel.flush().map_err(CallError::Lost)? {
            return Ok(false);
        }
        if self.has_answer {
            return Ok(true);
        }
        let hung_up = |error| CallError::Refused(format!("no answer to the hello (is it of another generation?): {error}"));
        let Some(challenge) = self.channel.receive(CHALLENGE_BYTES).map_err(hung_up)? else { return Ok(false) };
        let (nonce, tag) = challenge.split_at(NONCE_BYTES);
        if claim(key, ANSWERER, &self.hello, nonce).verify_slice(tag).is_err() {
            return Err(CallError::Refused("it does not hold this generation's key".into()));
        }
        self.has_answer = true;
        let proof = claim(key, CALLER, &self.hello, nonce).finalize().into_bytes();
        self.channel.send(&proof).map_err(CallError::Lost)?;
        self.channel.flush().map_err(CallError::Lost)
    }
}

/// The answering side of a handshake.
#[derive(Debug)]
pub(super) struct Answerer {
    pub(super) channel: Channel,
    /// The introduction and the proof that must follow it.
    pending: Option<(Hello, Hmac<Sha256>)>,
}

impl Answerer {
    /// Waits for an introduction.
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { channel: Channel::new(stream), pending: None }
    }

    /// Whether the caller has said that it comes for this.
    pub(super) fn is_called_for(&self, purpose: Purpose) -> bool {
        self.pending.as_ref().is_some_and(|(hello, _)| hello.purpose == purpose)
    }

    /// Goes as far as it can without waiting. Returns the caller's introduction once the key is proved.
    ///
    /// Errors: a caller to be dropped, whoever it is.
    pub(super) fn advance(&mut self, key: &Key, us: &Membership) -> io::Result<Option<Hello>> {
        if self.pending.is_none() {
            let Some(bytes) = self.channel.receive(HELLO_BYTES)? else { return Ok(None) };
            let hello = Hello::decode(&bytes)?;
            hello.check(us)?;
            let nonce = random_bytes().map_err(io::Error::other)?;
            let tag = claim(key, ANSWERER, &bytes, &nonce).finalize().into_bytes();
            self.channel.send(&[nonce.as_slice(), tag.as_slice()].concat())?;
            self.pending = Some((hello, claim(key, CALLER, &bytes, &nonce)));
        }
        if !self.channel.flush()? {
            return Ok(None);
        }
        let Some(proof) = self.channel.receive(TAG_BYTES)? else { return Ok(None) };
        match self.pending.take() {
            // `verify_slice` compares in constant time.
            Some((hello, expected)) if expected.clone().verify_slice(&proof).is_ok() => Ok(Some(hello)),
            _ => Err(invalid("wrong key")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Hello {
        let listener = "127.0.0.1:9".parse().unwrap();
        Hello { purpose: Purpose::Register, generation: 1 << 40, num_members: 3, from: 2, to: 0, listener }
    }

    #[test]
    fn hello_survives_the_wire() {
        let bytes = hello().encode(&[3; NONCE_BYTES]);
        assert_eq!(bytes.len(), HELLO_BYTES);
        assert_eq!(Hello::decode(&bytes).unwrap(), hello());
        assert!(Hello::decode(&[0; HELLO_BYTES]).is_err());
    }

    #[test]
    fn only_expected_callers_are_let_in() {
        let us = Membership { generation: 1 << 40, member_index: 0, num_members: 3 };
        assert!(hello().check(&us).is_ok());
        assert!(Hello { purpose: Purpose::Ring, ..hello() }.check(&us).is_ok());
        for bad in [
            Hello { generation: 1, ..hello() },
            Hello { num_members: 4, ..hello() },
            Hello { to: 1, ..hello() },
            Hello { from: 0, ..hello() },
            Hello { from: 3, ..hello() },
            Hello { purpose: Purpose::Ring, from: 1, ..hello() },
        ] {
            assert!(bad.check(&us).is_err(), "{bad:?}");
        }
    }

    /// RFC 4231, test case 2 ("Jefe"): the padded key makes the same digest as the key itself.
    #[test]
    fn claims_are_hmac_sha256() {
        let mut key = [0; KEY_BYTES];
        key[..4].copy_from_slice(b"Jefe");
        let tag = claim(&key, "what do ya want ", b"for ", b"nothing?").finalize().into_bytes();
        let hex: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
