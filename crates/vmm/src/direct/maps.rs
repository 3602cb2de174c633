//! What a process has mapped where.

use std::fs::File;
use std::io::{self, Read};

/// Bytes of a process's map that are read: some 100 bytes a line, of which a QEMU has a few hundred.
const MAX_MAPS: u64 = 4 << 20;

/// One line of `/proc/PID/maps` (proc_pid_maps(5)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    pub(super) end: u64,
    /// `rwxp`, each or `-`; the last one `s` where the mapping is shared.
    pub(super) permissions: [u8; 4],
    /// Where in the file it begins.
    pub(super) offset: u64,
    pub(super) device: (u32, u32),
    /// Zero where there is no file.
    pub(super) inode: u64,
}

/// All mappings of a process, by ascending address.
pub(super) fn mappings(pid: i32) -> io::Result<Vec<Mapping>> {
    let mut text = String::new();
    File::open(format!("/proc/{pid}/maps"))?.take(MAX_MAPS).read_to_string(&mut text)?;
    Ok(text.lines().filter_map(parse).collect())
}

fn parse(line: &str) -> Option<Mapping> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let number = |text| u32::from_str_radix(text, 16).ok();
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let permissions = fields.next()?.as_bytes().try_into().ok()?;
    let offset = hex(fields.next()?)?;
    let (high, low) = fields.next()?.split_once(':')?;
    let device = (number(high)?, number(low)?);
    let inode = fields.next()?.parse().ok()?;
    (start < end).then_some(Mapping { start, end, permissions, offset, device, inode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_mapping_or_nothing() {
        let line = "7f0000000000-7f0000001000 r-xp 00002000 fe:1f 262 /usr/lib/a b (deleted)";
        let mapping = parse(line).unwrap();
        assert_eq!((mapping.start, mapping.end, mapping.offset), (0x7f0000000000, 0x7f0000001000, 0x2000));
        assert_eq!((&mapping.permissions, mapping.device, mapping.inode), (b"r-xp", (0xfe, 0x1f), 262));
        assert_eq!(parse("7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 ").unwrap().inode, 0);
        for line in ["", "not a line", "1000-0 r--p 0 0:0 0", "0-1000 r--p 0 0 0", "0-1000 r-- 0 0:0 0"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
