//! What member 0 hands out so that the others find it and can prove that they belong to it.

use std::fmt;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::str::FromStr;

use super::wire::{self, ADDRESS_BYTES, Fields};
use crate::Error;

/// Bytes of a generation's key.
pub(super) const KEY_BYTES: usize = 32;

/// The secret of one generation.
pub(super) type Key = [u8; KEY_BYTES];

const VERSION: u8 = 1;

/// Where member 0 listens, and the key that every member must prove. Whoever has these bytes can join: they travel on secured channels
/// only.
#[derive(Clone, PartialEq, Eq)]
pub struct Bootstrap {
    pub(super) address: SocketAddr,
    pub(super) key: Key,
}

impl Bootstrap {
    /// Length of the encoded form.
    pub const NUM_BYTES: usize = 1 + KEY_BYTES + ADDRESS_BYTES;

    /// Encodes: version, key, address of member 0's listener.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::NUM_BYTES);
        bytes.push(VERSION);
        bytes.extend_from_slice(&self.key);
        wire::put_address(&mut bytes, self.address);
        bytes
    }

    /// Decodes what [`to_bytes`](Self::to_bytes) made.
    ///
    /// Errors: [`Error::Bootstrap`] for another version, another length or an address nobody can listen on.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let bad = |reason: String| Error::Bootstrap { reason };
        match bytes.first() {
            None => return Err(bad("no bytes".into())),
            Some(&VERSION) => {}
            Some(version) => return Err(bad(format!("version {version}, this program knows {VERSION}"))),
        }
        if bytes.len() != Self::NUM_BYTES {
            return Err(bad(format!("{} bytes where version {VERSION} has {}", bytes.len(), Self::NUM_BYTES)));
        }
        let mut fields = Fields(&bytes[1..]);
        let key = fields.take().map_err(|error| bad(error.to_string()))?;
        let address = fields.address().map_err(|error| bad(error.to_string()))?;
        if address.ip().is_unspecified() || address.port() == 0 {
            return Err(bad(format!("{address} is not an address to connect to")));
        }
        Ok(Self { address, key })
    }

    /// Where member 0 listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Leaves the key out: bootstraps end up in logs.
impl fmt::Debug for Bootstrap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bootstrap").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The ports that a member may listen on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    first: u16,
    last: u16,
}

impl Ports {
    /// Whichever the system has free.
    pub const ANY: Self = Self { first: 0, last: 0 };
}

impl FromStr for Ports {
    type Err = String;

    /// Reads `7800-7807`, or one port.
    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |text: &str| text.parse().ok().filter(|&port| port != 0);
        match (port(first), port(last)) {
            (Some(first), Some(last)) if first <= last => Ok(Self { first, last }),
            _ => Err(format!("{text:?} is no range of ports, such as 7800-7807")),
        }
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

/// A member's open port, through which the others reach it while a communicator forms. The kernel keeps callers waiting until then.
#[derive(Debug)]
pub struct Listener {
    pub(super) socket: TcpListener,
    pub(super) advertised: SocketAddr,
}

impl Listener {
    /// Opens the first free one of `ports` on the local address `bind` that other hosts reach as `advertise`.
    ///
    /// Errors: [`Error::InvalidArgument`] if `advertise` is not an address of a host, [`Error::NoPort`] if none of `ports` is free,
    /// [`Error::Io`] if `bind` cannot be listened on.
    pub fn open(bind: IpAddr, advertise: IpAddr, ports: Ports) -> Result<Self, Error> {
        if advertise.is_unspecified() || advertise.is_multicast() {
            return Err(Error::InvalidArgument { reason: format!("{advertise} cannot be advertised: it names no host") });
        }
        let is_taken = |error: &std::io::Error| ports != Ports::ANY && error.kind() == ErrorKind::AddrInUse;
        let mut tries = (ports.first..=ports.last).map(|port| TcpListener::bind((bind, port)));
        // One that is taken is another worker's, or another program's; anything else that is refused is so for all of them.
        let opened = tries.find(|opened| !matches!(opened, Err(error) if is_taken(error)));
        let socket = opened.ok_or(Error::NoPort { ports })?.map_err(Error::io("listen for members"))?;
        socket.set_nonblocking(true).map_err(Error::io("configure listener"))?;
        let port = socket.local_addr().map_err(Error::io("read listener's address"))?.port();
        Ok(Self { socket, advertised: SocketAddr::new(advertise, port) })
    }

    /// Makes a generation's bootstrap, with a fresh random key, for this listener's owner as member 0.
    pub fn bootstrap(&self) -> Result<Bootstrap, Error> {
        Ok(Bootstrap { address: self.advertised, key: random_bytes()? })
    }

    /// Where other members reach this one.
    pub fn advertised(&self) -> SocketAddr {
        self.advertised
    }
}

/// Draws from the operating system's generator.
pub(super) fn random_bytes() -> Result<[u8; KEY_BYTES], Error> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes).map_err(|error| Error::Io { doing: "draw random bytes", source: std::io::Error::other(error) })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bootstrap_survives_the_wire_and_hides_its_key() {
        let bootstrap = Bootstrap { address: "10.1.2.3:4567".parse().unwrap(), key: [171; KEY_BYTES] };
        assert_eq!(Bootstrap::from_bytes(&bootstrap.to_bytes()).unwrap(), bootstrap);
        assert_eq!(format!("{bootstrap:?}"), "Bootstrap { address: 10.1.2.3:4567, .. }");
    }

    #[test]
    fn unreadable_bootstraps_are_refused() {
        let good = Bootstrap { address: "10.1.2.3:4567".parse().unwrap(), key: [7; KEY_BYTES] }.to_bytes();
        let with = |index: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[index] = value;
            bytes
        };
        let long = [good.as_slice(), &[0]].concat();
        let unspecified = Bootstrap { address: "0.0.0.0:4567".parse().unwrap(), key: [7; KEY_BYTES] }.to_bytes();
        for bytes in [vec![], good[..20].to_vec(), long, with(0, 2), with(1 + KEY_BYTES, 5), unspecified] {
            assert!(matches!(Bootstrap::from_bytes(&bytes), Err(Error::Bootstrap { .. })), "{bytes:?}");
        }
    }

    #[test]
    fn an_address_that_names_no_host_is_not_advertised() {
        let [any, local] = [IpAddr::from([0, 0, 0, 0]), IpAddr::from([127, 0, 0, 1])];
        assert!(matches!(Listener::open(local, any, Ports::ANY), Err(Error::InvalidArgument { .. })));
    }

    #[test]
    fn ranges_of_ports_are_read_and_others_refused() {
        for (text, first, last) in [("7800-7807", 7800, 7807), ("65535", 65535, 65535), ("1-65535", 1, 65535)] {
            assert_eq!(text.parse(), Ok(Ports { first, last }));
        }
        for text in ["", "-", "0", "0-5", "7807-7800", "7800-", "7800-7807-7810", "7800-65536", "a-b", "7800 - 7807"] {
            let refused = text.parse::<Ports>().unwrap_err();
            assert!(refused.ends_with("is no range of ports, such as 7800-7807"), "{refused}");
        }
    }

    #[test]
    fn first_free_port_of_a_range_is_taken_and_none_is_an_error_that_names_it() {
        let local = IpAddr::from([127, 0, 0, 1]);
        // Two neighbours, of which the system says that they are free: another program may take them meanwhile, and the next are tried.
        let (ports, first, second) = (0..100)
            .find_map(|_| {
                let first = Listener::open(local, local, Ports::ANY).unwrap().advertised().port();
                let ports = Ports { first, last: first.checked_add(1)? };
                let [one, other] = [(); 2].map(|()| Listener::open(local, local, ports));
                Some((ports, one.ok()?, other.ok()?))
            })
            .expect("no two free ports in a row");
        assert_eq!([&first, &second].map(|listener| listener.advertised().port()), [ports.first, ports.last]);
        let refused = Listener::open(local, local, ports).unwrap_err().to_string();
        assert!(refused.starts_with(&format!("no port of {ports} is free for other workers to call (--ports)")), "{refused}");
        drop(first);
        assert_eq!(Listener::open(local, local, ports).unwrap().advertised().port(), ports.first);
    }
}
