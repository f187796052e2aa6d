//! What NCCL is told through the environment, which it reads when it is first used.

use std::net::IpAddr;

/// Sets what the user has not set.
///
/// `shares_gpus`: other members may train on the same GPU. `advertise`: the address that this host is to be reached under, if the user says
/// so.
///
/// # Safety
/// This process must not have a second thread yet: that might read the environment meanwhile.
pub unsafe fn settle(shares_gpus: bool, advertise: Option<IpAddr>) {
    let interfaces =
        || if_addrs::get_if_addrs().unwrap_or_default().into_iter().map(|interface| (interface.ip(), interface.name)).collect();
    for (name, value) in settings(shares_gpus, advertise, interfaces) {
        if std::env::var_os(name).is_none() {
            // SAFETY: there is no other thread, as the caller promises.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

fn settings(
    shares_gpus: bool,
    advertise: Option<IpAddr>,
    interfaces: impl FnOnce() -> Vec<(IpAddr, String)>,
) -> Vec<(&'static str, String)> {
    // Sums made in a switch come out otherwise each time; an adapter's gradient is too small to gain by them.
    let mut settings = vec![("NCCL_NVLS_ENABLE", "0".to_owned())];
    // Buffers are taken when members meet, with libtorch's spare memory given back, and not at the first sum, when a step has filled the
    // GPU.
    settings.push(("NCCL_RUNTIME_CONNECT", "0".to_owned()));
    if shares_gpus {
        // NCCL refuses two members on one GPU of a host: to it, each worker is a host of its own. (In containers all have the same process
        // id.)
        let mut bytes = [0; 8];
        // Without randomness the process id has to do.
        let _ = getrandom::fill(&mut bytes);
        settings.push(("NCCL_HOSTID", format!("peapod-{}-{:016x}", std::process::id(), u64::from_le_bytes(bytes))));
        // Hosts on one NVLink fabric would be members of one clique again, and their GPUs compared.
        settings.push(("NCCL_MNNVL_ENABLE", "0".to_owned()));
    }
    // Of several networks NCCL would choose one by itself, maybe one that leads nowhere.
    let interface = advertise.and_then(|address| interfaces().into_iter().find(|(own, _)| *own == address));
    if let Some((_, name)) = interface {
        // An equals sign: this name and none that begins with it.
        settings.push(("NCCL_SOCKET_IFNAME", format!("={name}")));
    }
    settings
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn nccl_takes_the_network_that_the_other_workers_are_to_use() {
        let address = |last| IpAddr::V4(Ipv4Addr::new(10, 0, 0, last));
        let interfaces = || vec![(address(1), "br-1".to_owned()), (address(2), "eth0".to_owned())];
        let of = |advertise| settings(false, advertise, interfaces);
        assert!(of(Some(address(2))).contains(&("NCCL_SOCKET_IFNAME", "=eth0".into())));
        // An address behind a translation is no interface's.
        assert!([Some(address(3)), None].map(of).iter().flatten().all(|(name, _)| *name != "NCCL_SOCKET_IFNAME"));
    }

    #[test]
    fn workers_that_share_a_gpu_are_hosts_of_their_own() {
        let host = || settings(true, None, Vec::new).into_iter().find(|(name, _)| *name == "NCCL_HOSTID").unwrap().1;
        assert_ne!(host(), host());
    }
}
