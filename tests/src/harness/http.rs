//! A small web server that fails as it is told to: for tests of everything that reads shards over a network.
//!
//! It stands on the standard library alone: the tests of the crate that reads shards include this file too.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What becomes of a read instead of a whole answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Only this status.
    Status(u16),
    /// So many bytes of the body, and then the connection ends.
    CutAfter(usize),
    /// So many bytes of the body, and then nothing, on a connection that stays open.
    StallAfter(usize),
}

/// How the server behaves beyond single faults.
#[derive(Debug, Clone, Copy, Default)]
pub struct Habits {
    /// Answers whole files whatever range is asked for.
    pub ignores_ranges: bool,
    /// Answers no more than so many bytes of a range.
    pub max_part: Option<usize>,
    /// Refuses HEAD.
    pub refuses_head: bool,
    /// Gives weak tags, which no `If-Match` matches.
    pub weak_tags: bool,
    /// Gives neither tags nor sizes of whole files.
    pub says_little: bool,
    /// Every so-manieth read fails in this way.
    pub fails_every: Option<(usize, Fault)>,
    /// Answers 401 to whoever shows another token than this, or any where it is none.
    pub token: Option<Option<&'static str>>,
    /// What it says in `X-Error-Code` then.
    pub error_code: Option<&'static str>,
}

/// A server on a port of its own; it ends when it is dropped.
#[derive(Debug)]
pub struct FileServer {
    address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    is_stopping: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Contents and version.
    files: BTreeMap<String, (Arc<[u8]>, u64)>,
    /// Where files are that lie elsewhere.
    redirects: BTreeMap<String, String>,
    version: u64,
    habits: Habits,
    faults: VecDeque<Fault>,
    num_reads: usize,
    requests: Vec<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileServer {
    /// Starts a server without files.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    #[allow(clippy::expect_used, reason = "it is a test's, and a panic is how a test fails")]
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Shared::default());
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                if accepting.is_stopping.load(Ordering::Acquire) {
                    return;
                }
                let (Ok(connection), shared) = (connection, accepting.clone()) else { continue };
                // A client that goes away in the middle is its own affair.
                std::thread::spawn(move || drop(answer(&shared, connection)));
            }
        });
        Self { address, shared }
    }

    /// The address of a file.
    #[must_use]
    pub fn url(&self, name: &str) -> String {
        format!("http://{}/{name}", self.address)
    }

    /// Puts a file there, or another version of it.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let mut state = self.shared.lock();
        state.version += 1;
        let version = state.version;
        state.files.insert(format!("/{name}"), (bytes.into(), version));
    }

    /// Answers who asks for `name` that it is at another address.
    pub fn redirect(&self, name: &str, url: &str) {
        self.shared.lock().redirects.insert(format!("/{name}"), url.to_owned());
    }

    /// Makes the next reads fail, one after the other.
    pub fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.shared.lock().faults.extend(faults);
    }

    /// Changes its habits.
    pub fn set_habits(&self, habits: Habits) {
        self.shared.lock().habits = habits;
    }

    /// Takes the list of requests since the last call: `GET /name 0-99`, `GET /name`, `HEAD /name`.
    #[must_use]
    pub fn take_requests(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().requests)
    }
}

impl Drop for FileServer {
    fn drop(&mut self) {
        self.shared.is_stopping.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

/// Reads one request and answers it.
fn answer(shared: &Shared, mut connection: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(connection.try_clone()?).lines();
    let first = lines.next().transpose()?.unwrap_or_default();
    let mut words = first.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let path = target.split('?').next().unwrap_or_default();
    let (mut range, mut wanted_tag, mut token) = (None, None, None);
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(':') else { continue };
        match name.to_ascii_lowercase().as_str() {
            "range" => range = value.trim().strip_prefix("bytes=").map(str::to_owned),
            "authorization" => token = value.trim().strip_prefix("Bearer ").map(str::to_owned),
            "if-match" => wanted_tag = Some(value.trim().to_owned()),
            _ => {}
        }
    }

    let mut state = shared.lock();
    let is_read = method == "GET";
    state.requests.push([method.as_str(), target.as_str(), range.as_deref().unwrap_or_default()].join(" ").trim_end().to_owned());
    let habits = state.habits;
    let fault = if is_read {
        state.num_reads += 1;
        let regular = habits.fails_every.filter(|(every, _)| state.num_reads.is_multiple_of(*every)).map(|(_, fault)| fault);
        state.faults.pop_front().or(regular)
    } else {
        None
    };
    let file = state.files.get(path).cloned();
    let redirect = state.redirects.get(path).cloned();
    drop(state);

    let status = |connection: &mut TcpStream, status: &str| {
        write!(connection, "HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    };
    if let Some(Fault::Status(code)) = fault {
        return status(&mut connection, &format!("{code} Fault"));
    }
    if !is_read && habits.refuses_head {
        return status(&mut connection, "405 Method Not Allowed");
    }
    if habits.token.is_some_and(|wanted| wanted != token.as_deref()) {
        let code = habits.error_code.map_or_else(String::new, |code| format!("\r\nX-Error-Code: {code}"));
        return status(&mut connection, &format!("401 Unauthorized{code}"));
    }
    if let Some(url) = redirect {
        return write!(connection, "HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let Some((bytes, version)) = file else { return status(&mut connection, "404 Not Found") };
    let tag = if habits.weak_tags { format!("W/\"{version}\"") } else { format!("\"{version}\"") };
    if wanted_tag.is_some_and(|wanted| habits.weak_tags || wanted != tag) {
        return status(&mut connection, "412 Precondition Failed");
    }

    let range = range.filter(|_| is_read && !habits.ignores_ranges).and_then(|range| {
        let (first, last) = range.split_once('-')?;
        let (first, end) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?.saturating_add(1).min(bytes.len()));
        Some((first, end.min(first.saturating_add(habits.max_part.unwrap_or(usize::MAX)))))
    });
    let (code, start, end) = match range {
        Some((start, _)) if start >= bytes.len() => {
            return write!(
                connection,
                "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Range: bytes */{}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                bytes.len()
            );
        }
        Some((start, end)) => ("206 Partial Content", start, end),
        None => ("200 OK", 0, bytes.len()),
    };
    write!(connection, "HTTP/1.1 {code}\r\nConnection: close\r\n")?;
    if !habits.says_little {
        write!(connection, "ETag: {tag}\r\n")?;
    }
    if range.is_some() {
        write!(connection, "Content-Range: bytes {start}-{}/{}\r\n", end - 1, bytes.len())?;
    }
    if !habits.says_little || range.is_some() {
        write!(connection, "Content-Length: {}\r\n", end - start)?;
    }
    write!(connection, "\r\n")?;
    if !is_read {
        return Ok(());
    }
    let body = &bytes[start..end];
    let len = match fault {
        Some(Fault::CutAfter(len) | Fault::StallAfter(len)) => len.min(body.len()),
        _ => body.len(),
    };
    connection.write_all(&body[..len])?;
    if matches!(fault, Some(Fault::StallAfter(_))) {
        while !shared.is_stopping.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}
