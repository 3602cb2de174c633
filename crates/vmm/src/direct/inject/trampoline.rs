//! The instructions that a thread goes through.

/// `O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY` (linux/userfaultfd.h).
const FLAGS: u32 = 0x8_0000 | 0x800 | 1;
/// Number of userfaultfd(2).
pub(super) const USERFAULTFD: u32 = 323;
/// Number of close(2).
const CLOSE: u32 = 3;
/// What the kernel sets the instruction pointer back by to restart a system call: the length of `syscall`.
const REWOUND: u64 = 2;
/// Bytes of one way through.
const WAY: usize = 64;
/// Where in a way the thread is after the first call.
const MADE: usize = 23;

/// Bytes of a trampoline.
pub(super) const LEN: usize = 2 + 2 * WAY;

/// A trampoline for a thread that stands at `at`.
pub(super) fn image(at: u64) -> [u8; LEN] {
    let mut image = [0; LEN];
    // Entered here if the kernel restarts the thread's system call: a short jump over the other way.
    image[..2].copy_from_slice(&[0xeb, WAY as u8]);
    image[2..][..WAY].copy_from_slice(&way(at));
    image[2 + WAY..].copy_from_slice(&way(at.wrapping_sub(REWOUND)));
    image
}

/// Where a thread is sent into a trampoline at `base`. The kernel may set it back to the other entry, right at `base`.
pub(super) fn entry(base: u64) -> u64 {
    base + REWOUND
}

/// Whether a thread that stands at `at` has just done the first call in a trampoline at `base`.
pub(super) fn has_made(base: u64, at: u64) -> bool {
    [2, 2 + WAY].iter().any(|way| base + (way + MADE) as u64 == at)
}

/// The way through that ends at `back`. The stack is used below the 128 bytes that leaf functions may use (System V ABI, 3.2.2), as a
/// signal's handler does. `lea`, `push` and `pop` leave the flags alone. There is no `call` and no `ret`, so a shadow
/// stack does not mind.
fn way(back: u64) -> [u8; WAY] {
    let [f0, f1, f2, f3] = FLAGS.to_le_bytes();
    let [u0, u1, u2, u3] = USERFAULTFD.to_le_bytes();
    let [c0, c1, c2, c3] = CLOSE.to_le_bytes();
    let [b0, b1, b2, b3, b4, b5, b6, b7] = back.to_le_bytes();
    #[rustfmt::skip]
    let way = [
        0x48, 0x8d, 0x64, 0x24, 0x80, //                    lea rsp, [rsp - 128]
        0x50, //                                            push rax
        0x51, //                                            push rcx     the kernel overwrites it
        0x41, 0x53, //                                      push r11     and this one
        0x57, //                                            push rdi
        0x9c, //                                            pushfq
        0xbf, f0, f1, f2, f3, //                            mov edi, FLAGS
        0xb8, u0, u1, u2, u3, //                            mov eax, USERFAULTFD
        0x0f, 0x05, //                                      syscall
        0x85, 0xc0, //                                      test eax, eax
        0x78, 0x09, //                                      js 1f
        0x89, 0xc7, //                                      mov edi, eax
        0xb8, c0, c1, c2, c3, //                            mov eax, CLOSE
        0x0f, 0x05, //                                      syscall
        0x9d, //                                         1: popfq
        0x5f, //                                            pop rdi
        0x41, 0x5b, //                                      pop r11
        0x59, //                                            pop rcx
        0x58, //                                            pop rax
        0x48, 0x8d, 0xa4, 0x24, 0x80, 0x00, 0x00, 0x00, //  lea rsp, [rsp + 128]
        0xff, 0x25, 0x00, 0x00, 0x00, 0x00, //              jmp [rip]
        b0, b1, b2, b3, b4, b5, b6, b7,
    ];
    way
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_entries_lead_to_a_way_of_their_own() {
        let image = image(0x1122_3344_5566_7788);
        let (entry, base) = (entry(0x1000), 0x1000);
        let direct = (entry - base) as usize;
        let rewound = 2 + usize::from(image[1]);
        assert_eq!(image[direct..][..5], image[rewound..][..5]);
        assert_eq!(image[rewound - 8..rewound], 0x1122_3344_5566_7788_u64.to_le_bytes());
        assert_eq!(image[LEN - 8..], 0x1122_3344_5566_7786_u64.to_le_bytes());
        for way in [direct, rewound] {
            assert_eq!(image[way + MADE - 2..way + MADE], [0x0f, 0x05]);
            assert!(has_made(base, base + (way + MADE) as u64));
        }
        assert!(!has_made(base, base));
    }
}
