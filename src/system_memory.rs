//! How much memory there is.

/// Memory that this process may take at most, where the system tells (Linux): that of the machine or of its container, with all that can
/// be swapped, or what `ulimit -v` allows.
pub(crate) fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let bytes = |key| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()?.checked_mul(1024)
    };
    let container = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        .into_iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok());
    let memory = [bytes("MemTotal:"), container].into_iter().flatten().min()?;
    let with_swap = memory.saturating_add(bytes("SwapTotal:").unwrap_or(0));
    Some(address_space().map_or(with_swap, |limit| limit.min(with_swap)))
}

/// The address space that this process may have, if it is limited.
#[cfg(all(target_os = "linux", target_pointer_width = "64"))]
fn address_space() -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a valid place to write to.
    let told = unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut limit) } == 0;
    (told && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
fn address_space() -> Option<u64> {
    None
}
