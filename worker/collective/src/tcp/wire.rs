//! Byte layouts. All of them have a fixed length, so no length is ever taken from a stranger. Integers are little-endian.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};

use crate::{Announcement, Operation};

/// Reads fixed-size fields from the front of a slice.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    /// The next `N` bytes, or an error if fewer are left.
    pub(super) fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(|| invalid("message too short"))?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next byte.
    pub(super) fn byte(&mut self) -> io::Result<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    /// The next 32-bit number.
    pub(super) fn u32(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next 64-bit number.
    pub(super) fn u64(&mut self) -> io::Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    /// The next socket address.
    pub(super) fn address(&mut self) -> io::Result<SocketAddr> {
        let (family, octets, port) = (self.byte()?, self.take::<16>()?, u16::from_le_bytes(self.take()?));
        let ip = match family {
            4 => {
                let [a, b, c, d, ..] = octets;
                IpAddr::from([a, b, c, d])
            }
            6 => IpAddr::from(octets),
            _ => return Err(invalid("unknown address family")),
        };
        Ok(SocketAddr::new(ip, port))
    }
}

/// Bytes of an encoded socket address.
pub(super) const ADDRESS_BYTES: usize = 1 + 16 + 2;

/// Encodes an address: family (4 or 6), 16 octets (IPv4 uses the first four), port. An IPv6 scope is not kept: it means nothing elsewhere.
pub(super) fn put_address(out: &mut Vec<u8>, address: SocketAddr) {
    let mut octets = [0; 16];
    let family = match address.ip() {
        IpAddr::V4(ip) => {
            octets[..4].copy_from_slice(&ip.octets());
            4
        }
        IpAddr::V6(ip) => {
            octets = ip.octets();
            6
        }
    };
    out.push(family);
    out.extend_from_slice(&octets);
    out.extend_from_slice(&address.port().to_le_bytes());
}

/// Bytes of the header that comes before a collective's data.
pub(super) const HEADER_BYTES: usize = 8 + 8 + 4 + 4;

/// Encodes an announcement: sequence number, length, operation, root.
pub(super) fn encode_header(announcement: &Announcement) -> [u8; HEADER_BYTES] {
    let (operation, root) = match announcement.operation {
        Operation::Rendezvous => (0u32, 0),
        Operation::AllReduceSum => (1, 0),
        Operation::Broadcast { root } => (2, root),
        Operation::Barrier => (3, 0),
    };
    let mut header = [0; HEADER_BYTES];
    header[0..8].copy_from_slice(&announcement.sequence.to_le_bytes());
    header[8..16].copy_from_slice(&announcement.num_bytes.to_le_bytes());
    header[16..20].copy_from_slice(&operation.to_le_bytes());
    header[20..24].copy_from_slice(&root.to_le_bytes());
    header
}

/// Decodes what [`encode_header`] made; the stream is not at a header if that fails.
pub(super) fn decode_header(header: &[u8; HEADER_BYTES]) -> io::Result<Announcement> {
    let mut fields = Fields(header);
    let (sequence, num_bytes) = (fields.u64()?, fields.u64()?);
    let operation = match (fields.u32()?, fields.u32()?) {
        (0, 0) => Operation::Rendezvous,
        (1, 0) => Operation::AllReduceSum,
        (2, root) => Operation::Broadcast { root },
        (3, 0) => Operation::Barrier,
        _ => return Err(invalid("not the header of a collective")),
    };
    Ok(Announcement { sequence, operation, num_bytes })
}

/// An error for bytes that no member of this generation would send.
pub(super) fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_survive_the_wire() {
        for text in ["127.0.0.1:7733", "[2001:db8::17]:65535"] {
            let address: SocketAddr = text.parse().unwrap();
            let mut bytes = Vec::new();
            put_address(&mut bytes, address);
            assert_eq!(bytes.len(), ADDRESS_BYTES);
            assert_eq!(Fields(&bytes).address().unwrap(), address);
        }
        assert!(Fields(&[5; ADDRESS_BYTES]).address().is_err());
        assert!(Fields(&[4; ADDRESS_BYTES - 1]).address().is_err());
    }

    #[test]
    fn headers_survive_the_wire() {
        for operation in [Operation::Rendezvous, Operation::AllReduceSum, Operation::Broadcast { root: 7 }, Operation::Barrier] {
            let announcement = Announcement { sequence: u64::MAX - 1, operation, num_bytes: 24_000_000 };
            assert_eq!(decode_header(&encode_header(&announcement)).unwrap(), announcement);
        }
        assert!(decode_header(&[9; HEADER_BYTES]).is_err());
    }
}
