//! Recycled read buffers whose parts travel as [`Bytes`].

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Bytes of buffers kept for the next use; what was in flight beyond that is returned to the allocator. On a long link that is a lot, and
/// it comes back in bursts: memory that goes to the system and comes again costs more than to fill it.
const KEEP: usize = 32 << 20;

/// Buffers of one size. They are zeroed once, when made; a recycled one holds old bytes until they are written over.
#[derive(Debug)]
pub(super) struct Pool {
    size: usize,
    free: Mutex<Vec<Vec<u8>>>,
}

impl Pool {
    pub(super) fn new(size: usize) -> Arc<Self> {
        Arc::new(Pool { size, free: Mutex::new(Vec::new()) })
    }

    pub(super) fn get(&self) -> Vec<u8> {
        let recycled = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        recycled.unwrap_or_else(|| vec![0; self.size])
    }

    /// Turns a buffer into bytes that give it back to the pool once the last part of them is dropped.
    pub(super) fn share(self: &Arc<Self>, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lease { buffer, pool: Arc::clone(self) })
    }
}

struct Lease {
    buffer: Vec<u8>,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut free = self.pool.free.lock().unwrap_or_else(PoisonError::into_inner);
        if (free.len() + 1) * self.pool.size <= KEEP {
            free.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_once_its_last_part_is_dropped() {
        let pool = Pool::new(64);
        let buffer = pool.get();
        let address = buffer.as_ptr();
        let whole = pool.share(buffer);
        let part = whole.slice(8..16);
        drop(whole);
        let other = pool.get();
        assert_ne!(other.as_ptr(), address);
        drop(part);
        let same = pool.get();
        assert_eq!(same.as_ptr(), address);
    }
}
