//! Named limits. Every length from outside meets one of these before memory is taken for it.

/// Bytes of a guest page. Guests with another migration page size travel as opaque bytes.
pub const PAGE_SIZE: usize = 4096;

/// Characters of a node name, VM name or migration id.
pub const MAX_NAME: usize = 64;

/// Characters of a RAM block's name: QEMU writes its length in one byte.
pub const MAX_BLOCK_NAME: usize = 255;

/// RAM blocks of one VM.
pub const MAX_BLOCKS: usize = 1024;

/// Bytes of guest pages in one chunk.
pub const MAX_CHUNK_PAGES_BYTES: usize = 1 << 20;

/// Records in one segment, zero pages included: 16 MiB of guest memory when all are zero.
pub const MAX_SEGMENT_RECORDS: usize = 4096;

/// Bytes of the VMM's stream in one segment: the pages, their record headers and names, and opaque bytes.
pub const MAX_SEGMENT_BYTES: usize = MAX_CHUNK_PAGES_BYTES + (128 << 10);

/// Bytes of a chunk's payload before compression: the same content plus the table of records.
pub const MAX_RAW_PAYLOAD: usize = MAX_SEGMENT_BYTES + (64 << 10);

/// Bytes of a chunk's payload on the wire. An encoder that would exceed it sends the payload raw.
pub const MAX_WIRE_PAYLOAD: usize = MAX_RAW_PAYLOAD;

/// Bytes of a lane's window, at least: less than a few chunks would gain nothing.
pub const MIN_LANE_WINDOW: u64 = 1 << 20;

/// Bytes of a lane's window, at most; what both ends offer may be less.
pub const MAX_LANE_WINDOW: u64 = 64 << 20;

/// Bytes of a message during the handshake.
pub const MAX_HANDSHAKE: usize = 16 << 10;

/// Bytes of a control message once the session stands.
pub const MAX_CONTROL: usize = 16 << 10;
