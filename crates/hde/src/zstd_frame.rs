//! A zstd frame's header, read before the library sees the frame (RFC 8878, section 3.1.1.1).

use crate::format::MAX_WINDOW;

const MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// Why a zstd payload is refused unseen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The header is cut off, or this is no zstd frame.
    #[error("not a zstd frame")]
    NotAFrame,
    /// The frame asks for a dictionary.
    #[error("the zstd frame names a dictionary")]
    Dictionary,
    /// The frame asks for more memory than the limit.
    #[error("the zstd frame's window of {0} bytes is over the limit")]
    Window(u64),
    /// The frame does not say how much it holds.
    #[error("the zstd frame does not give its content size")]
    NoContentSize,
    /// The frame holds more or less than announced.
    #[error("the zstd frame's content size {0} is not what was announced")]
    ContentSize(u64),
    /// Something follows the frame, or it is cut off.
    #[error("the payload is not one whole zstd frame")]
    NotOneFrame,
}

/// Checks that `payload` is one whole frame with exactly `raw_len` bytes of content and modest demands.
pub(crate) fn check(payload: &[u8], raw_len: usize) -> Result<(), FrameError> {
    let content = content_size(payload)?;
    if content != raw_len as u64 {
        return Err(FrameError::ContentSize(content));
    }
    match zstd_safe::find_frame_compressed_size(payload) {
        Ok(len) if len == payload.len() => Ok(()),
        _ => Err(FrameError::NotOneFrame),
    }
}

/// Checks the header of a frame that is not to end with its payload, and whose content nobody knows the size of: its window is at most
/// `max_window`.
pub(crate) fn check_endless(payload: &[u8], max_window: u64) -> Result<(), FrameError> {
    let rest = payload.strip_prefix(&MAGIC).ok_or(FrameError::NotAFrame)?;
    match *rest {
        // No content size, no single segment, no checksum, no dictionary.
        [0, window, ..] => match window_size(window) {
            size if size > max_window => Err(FrameError::Window(size)),
            _ => Ok(()),
        },
        [descriptor, ..] if descriptor & 0x03 != 0 => Err(FrameError::Dictionary),
        _ => Err(FrameError::NotAFrame),
    }
}

fn window_size(descriptor: u8) -> u64 {
    let base = 1u64 << (10 + (descriptor >> 3));
    base + base / 8 * u64::from(descriptor & 7)
}

fn content_size(frame: &[u8]) -> Result<u64, FrameError> {
    let rest = frame.strip_prefix(&MAGIC).ok_or(FrameError::NotAFrame)?;
    let (&descriptor, mut rest) = rest.split_first().ok_or(FrameError::NotAFrame)?;
    let single_segment = descriptor & 0x20 != 0;
    let reserved = descriptor & 0x08 != 0;
    if reserved {
        return Err(FrameError::NotAFrame);
    }
    if descriptor & 0x03 != 0 {
        return Err(FrameError::Dictionary);
    }
    // A single segment's window is its content, which has a limit of its own.
    if !single_segment {
        let (&window, after) = rest.split_first().ok_or(FrameError::NotAFrame)?;
        rest = after;
        let size = window_size(window);
        if size > MAX_WINDOW {
            return Err(FrameError::Window(size));
        }
    }
    let field = |len: usize| -> Option<u64> {
        rest.get(..len).map(|bytes| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    let size = match descriptor >> 6 {
        0 if !single_segment => return Err(FrameError::NoContentSize),
        0 => field(1),
        1 => field(2).map(|size| size + 256),
        2 => field(4),
        _ => field(8),
    };
    size.ok_or(FrameError::NotAFrame)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// `data` as one frame, as the library makes it.
    pub(crate) fn compress(data: &[u8], level: i32) -> Vec<u8> {
        let mut frame = vec![0; zstd_safe::compress_bound(data.len())];
        let len = zstd_safe::compress(&mut frame[..], data, level).unwrap();
        frame.truncate(len);
        frame
    }

    #[test]
    fn the_library_and_we_read_the_same_content_size() {
        for len in [0usize, 1, 255, 256, 65_535, 65_791, 65_792, 1 << 20] {
            for level in [-3, 1, 3, 9] {
                let data = vec![7; len];
                let mut frame = compress(&data, level);
                assert_eq!(content_size(&frame), Ok(len as u64));
                assert_eq!(check(&frame, len), Ok(()));
                assert_eq!(check(&frame, len + 1), Err(FrameError::ContentSize(len as u64)));
                assert_eq!(check(&frame[..frame.len() - 1], len), Err(FrameError::NotOneFrame));
                frame.push(0);
                assert_eq!(check(&frame, len), Err(FrameError::NotOneFrame));
            }
        }
    }

    #[test]
    fn a_header_cut_off_anywhere_is_no_frame() {
        let frame = compress(&[1; 100_000], 3);
        for len in 0..6 {
            assert_eq!(content_size(&frame[..len]), Err(FrameError::NotAFrame));
        }
    }
}
