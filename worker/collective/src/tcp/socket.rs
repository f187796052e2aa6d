//! Non-blocking sockets: one attempt at a time, and a wait with a deadline.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use rustix::event::{PollFd, Timespec};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

/// Makes a stream that never blocks and never holds small messages back.
pub(super) fn configure(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Starts to connect. Until that is done reads and writes would block; should it fail, the next one says why.
pub(super) fn start_connect(address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    let stream = {
        socket.set_nonblocking(true)?;
        match socket.connect(&address.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => return Err(error),
            _ => TcpStream::from(socket),
        }
    };
    configure(stream)
}

/// Reads what is there into `buffer` (not empty). `None`: nothing yet. A closed stream is an error.
pub(super) fn try_read(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match unless_blocked(|| stream.read(buffer))? {
        Some(0) => Err(io::Error::new(ErrorKind::UnexpectedEof, "the peer closed the connection")),
        outcome => Ok(outcome),
    }
}

/// Writes what the kernel takes of `bytes` (not empty). `None`: nothing for now.
pub(super) fn try_write(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<Option<usize>> {
    unless_blocked(|| stream.write(bytes))
}

/// Repeats an attempt that a signal cut short and turns "would block" into `None`.
pub(super) fn unless_blocked<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<Option<T>> {
    loop {
        match attempt() {
            Ok(value) => return Ok(Some(value)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Waits until something happens on one of `fds`, or until `deadline`.
pub(super) fn wait(fds: &mut [PollFd<'_>], deadline: Instant) -> io::Result<()> {
    // Out of range means centuries: as good as no limit.
    let timeout = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
    match rustix::event::poll(fds, timeout.as_ref()) {
        // A signal is a wake-up like any other: the caller looks at everything again.
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
