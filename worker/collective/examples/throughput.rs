//! Times all-reduce and barrier over loopback, and a plain copy through one socket beside them: `cargo run -p peapod-collective --example
//! throughput [MB] [MEMBERS]`.

use std::error::Error as StdError;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use peapod_collective::tcp::{Listener, Membership, Ports, TcpCollective};
use peapod_collective::{AbortHandle, Collective, Error};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const NUM_ROUNDS: u32 = 30;

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn main() -> Result<(), Box<dyn StdError>> {
    let mut args = std::env::args().skip(1);
    let num_bytes = args.next().map_or(Ok(24.0), |text| text.parse::<f64>())? * 1e6;
    let num_members = args.next().map_or(Ok(2), |text| text.parse::<u32>())?;

    let at_zero = Listener::open(LOCAL, LOCAL, Ports::ANY)?;
    let bootstrap = at_zero.bootstrap()?;
    let others: Vec<_> = (1..num_members)
        .map(|index| {
            let bootstrap = bootstrap.clone();
            thread::spawn(move || {
                let us = Membership { generation: 0, member_index: index, num_members };
                let listener = Listener::open(LOCAL, LOCAL, Ports::ANY)?;
                time_member(TcpCollective::connect(&bootstrap, us, listener, AbortHandle::new(), soon())?, num_bytes as usize)
            })
        })
        .collect();
    let us = Membership { generation: 0, member_index: 0, num_members };
    let zero = TcpCollective::connect(&bootstrap, us, at_zero, AbortHandle::new(), soon())?;
    let (times, mut barriers) = time_member(zero, num_bytes as usize)?;
    for other in others {
        other.join().map_err(|_| "a member panicked")??;
    }
    println!("all_reduce of {:.1} MB, {num_members} members: {}", num_bytes / 1e6, describe(times, num_bytes));
    barriers.sort();
    println!("barrier, {num_members} members: median {:.2?}, best {:.2?}", barriers[barriers.len() / 2], barriers[0]);
    println!(
        "plain one-way copy of {:.1} MB through a socket: {}",
        num_bytes / 1e6,
        describe(time_plain_copy(num_bytes as usize)?, num_bytes)
    );
    Ok(())
}

/// How long its all-reduces took, and its barriers.
fn time_member(mut member: TcpCollective, num_bytes: usize) -> Result<(Vec<Duration>, Vec<Duration>), Error> {
    let mut data = vec![0.0; num_bytes / size_of::<f32>()];
    let mut round = || {
        member.barrier(soon())?;
        let began = Instant::now();
        member.all_reduce_sum(&mut data, soon())?;
        Ok(began.elapsed())
    };
    let sums: Vec<Duration> = (0..NUM_ROUNDS).map(|_| round()).collect::<Result<_, Error>>()?;
    let mut barrier = || {
        let began = Instant::now();
        member.barrier(soon())?;
        Ok(began.elapsed())
    };
    let barriers = (0..NUM_ROUNDS).map(|_| barrier()).collect::<Result<_, Error>>()?;
    Ok((sums, barriers))
}

/// One thread writes, the other reads and answers with a byte.
fn time_plain_copy(num_bytes: usize) -> std::io::Result<Vec<Duration>> {
    let listener = TcpListener::bind((LOCAL, 0))?;
    let address = listener.local_addr()?;
    let reader = thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut buffer = vec![0; num_bytes];
        for _ in 0..NUM_ROUNDS {
            stream.read_exact(&mut buffer)?;
            stream.write_all(&[1])?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(address)?;
    let data = vec![1; num_bytes];
    let mut round = || {
        let began = Instant::now();
        stream.write_all(&data)?;
        stream.read_exact(&mut [0])?;
        Ok(began.elapsed())
    };
    let times = (0..NUM_ROUNDS).map(|_| round()).collect();
    reader.join().map_err(|_| std::io::Error::other("the reader panicked"))??;
    times
}

fn describe(mut times: Vec<Duration>, num_bytes: f64) -> String {
    times.sort();
    let rate = |time: Duration| num_bytes / time.as_secs_f64() / 1e9;
    let (best, median) = (times[0], times[times.len() / 2]);
    format!("median {median:.2?} ({:.2} GB/s), best {best:.2?} ({:.2} GB/s)", rate(median), rate(best))
}
