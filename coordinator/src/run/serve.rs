//! What a run opens to its workers and to commands: the port, and the services behind it.

use std::fmt::Display;
use std::net::SocketAddr;

use peapod_proto::{MAX_MESSAGE_BYTES, v1};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;

use crate::config::RunArgs;
use crate::driver::Command;
use crate::gallery::MAX_PNG_BYTES;
use crate::gate::{self, Guard, Refusals};
use crate::limits::SizeLimits;
use crate::secrets::Secrets;
use crate::service::Service;

/// One message of an upload.
const MAX_CHUNK_BYTES: usize = 4 << 20;
/// A control command's request: all of them are small.
const MAX_REQUEST_BYTES: usize = 64 << 10;
/// Calls at the same time on one connection. A worker has its stream, and a few transfers.
const MAX_STREAMS: u32 = 64;
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Connections that may wait to be taken; the system may allow fewer (net.core.somaxconn). Those that find no place are tried again by
/// their workers.
const BACKLOG: u32 = 8192;

/// Opens the port that all workers of a job come to at once.
pub(super) fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // The port of a coordinator that was just killed is free.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until the run is over.
pub(super) fn serve(
    args: &RunArgs,
    listener: TcpListener,
    secrets: Option<&Secrets>,
    service: Service,
    commands: mpsc::Sender<Command>,
    over: &watch::Receiver<bool>,
) -> JoinHandle<()> {
    let refusals = Refusals::default();
    let (tls, token) = secrets.map(|secrets| (secrets.tls.clone(), secrets.token.clone())).unzip();
    let incoming = gate::open(listener, tls, refusals.clone(), over.clone());
    let server = Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .http2_keepalive_interval(Some(args.heartbeat_timeout))
        .http2_keepalive_timeout(Some(args.heartbeat_timeout))
        .layer(InterceptorLayer::new(Guard::new(token, refusals)))
        .layer(SizeLimits)
        .add_service(v1::membership_server::MembershipServer::new(service.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .add_service(v1::checkpoints_server::CheckpointsServer::new(service.clone()).max_decoding_message_size(MAX_CHUNK_BYTES))
        .add_service(v1::pictures_server::PicturesServer::new(service.clone()).max_decoding_message_size(MAX_PNG_BYTES + 1024))
        .add_service(v1::control_server::ControlServer::new(service).max_decoding_message_size(MAX_REQUEST_BYTES))
        .serve_with_incoming_shutdown(incoming, wait_for(over.clone()));
    tokio::spawn(watched(tokio::spawn(server), commands, over.clone()))
}

/// Waits for a server. Should it end before the job, nobody would reach this coordinator any more, and nothing else would tell.
async fn watched<E: Display>(server: JoinHandle<Result<(), E>>, commands: mpsc::Sender<Command>, over: watch::Receiver<bool>) {
    let ended = server.await;
    if *over.borrow() {
        return;
    }
    let cause = match ended {
        Ok(Ok(())) => "it takes no more connections".to_owned(),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    let reason = format!("the server of the control port has ended: {cause}; the same command goes on with the job");
    let _ = commands.send(Command::Yield { reason }).await;
}

async fn wait_for(mut over: watch::Receiver<bool>) {
    // The sender lives as long as the run.
    let _ = over.wait_for(|&over| over).await;
}
