//! Buffers that travel as [`Bytes`] and come back for the next use: memory that goes to the system and comes again costs more than to
//! fill it.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Buffers that have come back. They hold old bytes until they are written over.
#[derive(Debug)]
pub struct Buffers {
    /// Bytes of them that are kept; what comes back beyond that is returned to the allocator.
    keep: usize,
    free: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// None yet; of those that come back so many bytes are kept.
    pub fn new(keep: usize) -> Arc<Self> {
        Arc::new(Buffers { keep, free: Mutex::new(Vec::new()) })
    }

    /// One that has come back, or an empty one.
    pub fn take(&self) -> Vec<u8> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// An empty buffer with room for `len` bytes, and for twice as many at most: one that has come back, if one fits. What waits in a
    /// buffer is counted by its length, so it must not keep much more than that from others.
    pub fn take_for(&self, len: usize) -> Vec<u8> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |buffer: &Vec<u8>| (len..=len.saturating_mul(2)).contains(&buffer.capacity());
        match free.iter().position(fits) {
            Some(at) => {
                let mut buffer = free.swap_remove(at);
                buffer.clear();
                buffer
            }
            None => {
                drop(free);
                Vec::with_capacity(len)
            }
        }
    }

    /// Turns a buffer into bytes that give it back once the last part of them is dropped.
    pub fn share(self: &Arc<Self>, buffer: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lease { buffer, from: Arc::clone(self) })
    }
}

struct Lease {
    buffer: Vec<u8>,
    from: Arc<Buffers>,
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        &self.buffer
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut free = self.from.free.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = free.iter().map(Vec::capacity).sum();
        if kept + self.buffer.capacity() <= self.from.keep {
            free.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_once_its_last_part_is_dropped() {
        let buffers = Buffers::new(64);
        let buffer = vec![0; 64];
        let address = buffer.as_ptr();
        let whole = buffers.share(buffer);
        let part = whole.slice(8..16);
        drop(whole);
        assert!(buffers.take().is_empty());
        drop(part);
        let again = buffers.take();
        assert_eq!(again.as_ptr(), address);
    }

    #[test]
    fn a_buffer_is_taken_again_only_for_what_fills_half_of_it() {
        let buffers = Buffers::new(100);
        let buffer = vec![1; 100];
        let address = buffer.as_ptr();
        drop(buffers.share(buffer));
        for len in [0, 49, 101] {
            let other = buffers.take_for(len);
            assert_ne!(other.as_ptr(), address, "{len}");
        }
        let again = buffers.take_for(50);
        assert_eq!((again.as_ptr(), again.len(), again.capacity()), (address, 0, 100));
    }

    #[test]
    fn what_is_too_much_does_not_come_back() {
        let buffers = Buffers::new(100);
        drop([buffers.share(vec![1; 60]), buffers.share(vec![2; 60])]);
        assert_eq!((buffers.take().len(), buffers.take().len()), (60, 0));
    }
}
