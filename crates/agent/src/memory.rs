//! What the allocator is told before anything else.

/// Has all threads share one arena. glibc gives each thread one of its own otherwise, up to eight a core, and each keeps some of the buffers
/// that were ever freed in it: an agent that had moved guests in both ways held twice as much as it used. Small allocations
/// come from each thread's own cache all the same, and large buffers are reused, so nobody waits for the one lock.
pub(crate) fn begin() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt(3) takes two numbers; it is called before there is a second thread, and what it refuses it leaves as it was.
    #[allow(unsafe_code)]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
