//! How much memory there is, and how much was used: read off `/proc`.

/// Bytes that could be taken now without swapping; `None` where the system does not say.
pub fn available_bytes() -> Option<u64> {
    kilobytes("/proc/meminfo", "MemAvailable:")
}

/// The most memory that this process has held at once, in bytes; `None` where the system does not say. A GPU's memory is not in it.
pub fn peak_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmHWM:")
}

/// The memory that this process holds now, in bytes; `None` where the system does not say. A GPU's memory is not in it.
pub fn held_bytes() -> Option<u64> {
    kilobytes("/proc/self/status", "VmRSS:")
}

fn kilobytes(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_its_memory() {
        let held = vec![1u8; 64 << 20];
        assert!(peak_bytes().unwrap() >= held.len() as u64 && held_bytes().unwrap() >= held.len() as u64);
        assert!(available_bytes().unwrap() > 1 << 20);
    }
}
