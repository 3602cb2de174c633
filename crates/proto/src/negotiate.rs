//! Negotiation: what two offers, a wish and the link allow.
//!
//! The source chooses, the destination holds the choice against both offers ([`permits`]); offers and choice are part of the session id,
//! so nobody in between can have altered them. A simpler path is never taken silently: each step down leaves a reason.

use crate::chunk::Codec;
use crate::limits::{MAX_BLOCK_NAME, MAX_LANE_WINDOW, MAX_RAW_PAYLOAD, MIN_LANE_WINDOW};
use crate::message::{Choice, Offer};

/// Which way a migration's bytes take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Path {
    /// One connection, the VMM's bytes as they are.
    V1,
    /// Chunks: hashed, signed, verified.
    V3,
}

impl Path {
    /// Its number in a [`Choice`].
    pub fn to_wire(self) -> u32 {
        match self {
            Path::V1 => 1,
            Path::V3 => 3,
        }
    }

    /// The path of a wire number.
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            1 => Some(Path::V1),
            3 => Some(Path::V3),
            _ => None,
        }
    }

    /// Its name in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Path::V1 => "v1",
            Path::V3 => "v3",
        }
    }
}

/// What v3 optimises for; also what kind of link it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Fewest bytes.
    Internet,
    /// Most bytes a second.
    Datacenter,
}

impl Mode {
    /// Its number in a [`Choice`].
    pub fn to_wire(self) -> u32 {
        match self {
            Mode::Internet => 0,
            Mode::Datacenter => 1,
        }
    }

    /// The mode of a wire number.
    pub fn from_wire(number: u32) -> Option<Self> {
        match number {
            0 => Some(Mode::Internet),
            1 => Some(Mode::Datacenter),
            _ => None,
        }
    }

    /// Its name in status and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Internet => "internet",
            Mode::Datacenter => "datacenter",
        }
    }
}

/// What the caller asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wish {
    /// The path, if not left to the agents.
    pub path: Option<Path>,
    /// The mode, if not left to the agents.
    pub mode: Option<Mode>,
    /// The number of data connections, if not left to the agents.
    pub streams: Option<u32>,
    /// QUIC for the data connections, wherever both sides and the leg can have it.
    pub quic: bool,
}

/// Why no choice is possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Impossible {
    /// v3 was asked for, and something bars it.
    #[error("v3 was asked for, but {0}")]
    V3Barred(String),
    /// v3 cannot be used, and policy bars v1.
    #[error("v3 cannot be used ({v3}) and v1 is barred by [policy] v1 at the {side}")]
    Nothing {
        /// Why not v3.
        v3: String,
        /// Whose policy bars v1.
        side: &'static str,
    },
    /// v1 was asked for, and policy bars it.
    #[error("v1 was asked for, but [policy] v1 at the {0} bars it on this link")]
    V1Barred(&'static str),
    /// An offer contradicts itself.
    #[error("the peer's offer makes no sense: {0}")]
    BadOffer(&'static str),
}

/// The choice of a leg that goes on as `wish` has it: what was negotiated at the beginning, but for the flag, which has changed since.
/// Whether the flag allows v3 now is each side's own to judge. `link` is what the link counts as for policy.
///
/// # Errors
/// The path is barred by policy, or the two agents share no version of it.
pub fn choose_again(
    source: &Offer,
    destination: &Offer,
    wish: Wish,
    link: Mode,
    before: &Choice,
) -> Result<Choice, Impossible> {
    let (source, destination) =
        (Offer { v3: true, ..source.clone() }, Offer { v3: true, ..destination.clone() });
    // What was written to the VMM's socket may be unread still: only a stream from its beginning can be mapped.
    let destination = Offer { mapped: Vec::new(), unmapped: String::new(), ..destination };
    let choice = choose(&source, &destination, wish, link)?;
    Ok(Choice { guest_runs: before.guest_runs, ..choice })
}

/// Whether both offers allow the choice of a later leg; the flag is not asked, see [`choose_again`].
pub fn permits_again(choice: &Choice, source: &Offer, destination: &Offer) -> Result<(), &'static str> {
    let (source, destination) =
        (Offer { v3: true, ..source.clone() }, Offer { v3: true, mapped: Vec::new(), ..destination.clone() });
    permits(choice, &source, &destination)
}

/// The largest window of internet mode. What is unpacked and waits for its turn, or is kept until acknowledged, comes on top of what is
/// remembered for references, and each end may take 64 MiB and 3 % of the guest's RAM in all. Compressed four times it is what 1 Gbit/s
/// carries in 60 ms.
pub const FAR_WINDOW: u64 = 32 << 20;
/// The smallest window that keeps two chunks in flight.
pub const MIN_WINDOW: u64 = 2 * MAX_RAW_PAYLOAD as u64;

const RAW: u32 = 1 << Codec::Raw as u32;

/// Chooses for a migration between `source` and `destination` over a link that counts as `link`.
pub fn choose(source: &Offer, destination: &Offer, wish: Wish, link: Mode) -> Result<Choice, Impossible> {
    for offer in [source, destination] {
        check(offer)?;
    }
    let mode = wish.mode.unwrap_or(link);
    let v3 = why_not_v3(source, destination);
    let v1 = why_not_v1(source, destination, link);
    let mut reasons = Vec::new();
    let path = match (wish.path, v3, v1) {
        (Some(Path::V3) | None, None, _) => Path::V3,
        (Some(Path::V3), Some(why), _) => return Err(Impossible::V3Barred(why)),
        (Some(Path::V1), _, None) => Path::V1,
        (Some(Path::V1), _, Some(side)) => return Err(Impossible::V1Barred(side)),
        (None, Some(why), None) => {
            reasons.push(format!("v1 instead of v3: {why}"));
            Path::V1
        }
        (None, Some(v3), Some(side)) => return Err(Impossible::Nothing { v3, side }),
    };
    let plain = link == Mode::Datacenter
        && mode == Mode::Datacenter
        && match path {
            Path::V1 => source.v1_plain && destination.v1_plain,
            Path::V3 => source.v3_plain && destination.v3_plain,
        };
    let most = source.streams.min(destination.streams);
    let streams = match (path, wish.streams) {
        (Path::V1, _) => 1,
        (Path::V3, Some(wished)) => {
            if wished > most {
                reasons.push(format!("{most} streams instead of {wished}: no more are offered"));
            }
            wished.clamp(1, most)
        }
        // One congestion window carries little over a long way; over a short one each costs CPU.
        (Path::V3, None) if mode == Mode::Internet => most.min(4),
        (Path::V3, None) => most.min(2),
    };
    let hde = source.hde.min(destination.hde);
    // Datacenter mode refers to nothing, and writes to RAM all the same.
    let holds = path == Path::V3 && hde >= REFERENCES;
    let mapped = holds && !destination.mapped.is_empty();
    let caches = holds && !mapped && mode == Mode::Internet;
    if holds && !mapped && !destination.unmapped.is_empty() {
        reasons.push(format!("sink stream instead of mapped: {}", destination.unmapped));
    }
    // Over the short way, and with nothing encrypted, TCP is the faster one; and v1 is one TCP connection.
    let quic = wish.quic && path == Path::V3 && mode == Mode::Internet && source.quic && destination.quic;
    Ok(Choice {
        path: path.to_wire(),
        mode: if path == Path::V1 { link } else { mode }.to_wire(),
        plain,
        streams,
        minor: source.minor_max.min(destination.minor_max),
        hde,
        window: match (path, mode) {
            (Path::V3, Mode::Internet) => source.window.min(destination.window).min(FAR_WINDOW),
            _ => source.window.min(destination.window),
        },
        reasons,
        guest_runs: false,
        mapped,
        cache_pages: if caches { destination.cache_pages } else { 0 },
        mode_reason: String::new(),
        quic,
        transport_reason: String::new(),
        lane_window: match mode {
            // A lane's chunks are decoded where references are resolved: in order.
            Mode::Internet if mapped || caches && destination.cache_pages > 0 => {
                lane_window(source, destination)
            }
            _ => 0,
        },
    })
}

/// The largest window that both sides have for a lane; 0 if there is none.
fn lane_window(source: &Offer, destination: &Offer) -> u64 {
    let most = source.lane_window.min(destination.lane_window).min(MAX_LANE_WINDOW);
    match most.checked_ilog2().map(|log| 1 << log) {
        Some(window) if window >= MIN_LANE_WINDOW => window,
        _ => 0,
    }
}

/// Whether a choice that the source made stays within both offers; the destination asks before it confirms.
pub fn permits(choice: &Choice, source: &Offer, destination: &Offer) -> Result<(), &'static str> {
    check(source).and(check(destination)).map_err(|_| "an offer makes no sense")?;
    let path = Path::from_wire(choice.path).ok_or("unknown path")?;
    let mode = Mode::from_wire(choice.mode).ok_or("unknown mode")?;
    let plain_ok = match path {
        Path::V1 => source.v1_plain && destination.v1_plain,
        Path::V3 => source.v3_plain && destination.v3_plain,
    };
    if path == Path::V3 && why_not_v3(source, destination).is_some() {
        return Err("v3 is not in both offers");
    }
    // On v1 the mode says how the link counts.
    if path == Path::V1 && why_not_v1(source, destination, mode).is_some() {
        return Err("v1 is not in both offers");
    }
    if choice.plain && (!plain_ok || mode != Mode::Datacenter) {
        return Err("plain TCP is not in both offers");
    }
    if choice.quic && (path != Path::V3 || mode != Mode::Internet || choice.plain) {
        return Err("QUIC where there can be none");
    }
    if choice.quic && !(source.quic && destination.quic) {
        return Err("QUIC is not in both offers");
    }
    if choice.streams == 0 || choice.streams > source.streams.min(destination.streams) {
        return Err("more streams than offered");
    }
    if choice.window < MIN_WINDOW || choice.window > source.window.min(destination.window) {
        return Err("a window outside the offers");
    }
    if choice.hde > source.hde.min(destination.hde)
        || choice.minor > source.minor_max.min(destination.minor_max)
    {
        return Err("a version outside the offers");
    }
    if path == Path::V3 && (choice.hde == 0 || choice.minor < source.minor_min.max(destination.minor_min)) {
        return Err("a version outside the offers");
    }
    let refers = choice.mapped || choice.cache_pages > 0;
    if refers && (path != Path::V3 || choice.hde < REFERENCES || choice.mapped && choice.cache_pages > 0) {
        return Err("references where there can be none");
    }
    if choice.mapped && destination.mapped.is_empty() || choice.cache_pages > destination.cache_pages {
        return Err("references to what the destination does not hold");
    }
    if choice.lane_window != 0 {
        let window = choice.lane_window;
        if !refers || mode != Mode::Internet {
            return Err("a lane where there can be none");
        }
        let known = window.is_power_of_two() && (MIN_LANE_WINDOW..=MAX_LANE_WINDOW).contains(&window);
        if !known || window > source.lane_window.min(destination.lane_window) {
            return Err("a lane's window outside the offers");
        }
    }
    if choice.mode_reason.len() > MAX_REASON
        || choice.transport_reason.len() > MAX_REASON
        || choice.reasons.len() > MAX_REASONS
        || choice.reasons.iter().any(|r| r.len() > MAX_REASON)
    {
        return Err("too many words for its reasons");
    }
    Ok(())
}

/// Reasons in a choice, and bytes of each: they are shown in status.
const MAX_REASONS: usize = 16;
const MAX_REASON: usize = 1024;
/// Bytes of what an offer says about its flag.
const MAX_FLAG_REASON: usize = 512;

fn check(offer: &Offer) -> Result<(), Impossible> {
    if offer.v3_reason.len() > MAX_FLAG_REASON || offer.v3_reason.chars().any(char::is_control) {
        return Err(Impossible::BadOffer("the words about its flag"));
    }
    let spoken = offer.unmapped.len() <= MAX_FLAG_REASON && !offer.unmapped.chars().any(char::is_control);
    if !spoken
        || offer.mapped.len() > MAX_MAPPED
        || offer.mapped.iter().any(|name| name.len() > MAX_BLOCK_NAME)
    {
        return Err(Impossible::BadOffer("what it says about the guest's RAM"));
    }
    if offer.minor_min > offer.minor_max {
        return Err(Impossible::BadOffer("its lowest version is above its highest"));
    }
    if offer.streams == 0 || offer.streams > MAX_STREAMS {
        return Err(Impossible::BadOffer("its number of streams"));
    }
    if offer.window < MIN_WINDOW {
        return Err(Impossible::BadOffer("its window is smaller than two chunks"));
    }
    if offer.codecs & RAW == 0 {
        return Err(Impossible::BadOffer("it does not take raw chunks"));
    }
    Ok(())
}

/// Most RAM blocks that an offer names as mapped: the handshake has room for them.
pub const MAX_MAPPED: usize = 16;

/// The payload encoding from which on chunks may refer to what the receiver holds.
pub const REFERENCES: u32 = 2;

/// Most data connections of one session.
pub const MAX_STREAMS: u32 = 16;

fn why_not_v3(source: &Offer, destination: &Offer) -> Option<String> {
    let low = source.minor_min.max(destination.minor_min);
    let high = source.minor_max.min(destination.minor_max);
    if !source.v3 {
        Some(format!("the source says: {}", source.v3_reason))
    } else if !destination.v3 {
        Some(format!("the destination says: {}", destination.v3_reason))
    } else if low > high {
        Some("the agents share no version of v3; upgrade the older one".to_owned())
    } else if source.codecs & destination.codecs != source.codecs {
        Some("the destination does not know all of the source's codecs; upgrade it".to_owned())
    } else if source.hde == 0 || destination.hde == 0 {
        Some("the agents share no payload encoding; upgrade the older one".to_owned())
    } else {
        None
    }
}

fn why_not_v1(source: &Offer, destination: &Offer, link: Mode) -> Option<&'static str> {
    let barred = |offer: &Offer| match offer.v1 {
        0 => true,
        1 => link != Mode::Datacenter,
        _ => false,
    };
    if barred(source) {
        Some("source")
    } else if barred(destination) {
        Some("destination")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        Offer {
            minor_min: 0,
            minor_max: 0,
            v1: 2,
            v1_plain: false,
            v3: true,
            v3_reason: "flag on".into(),
            v3_plain: false,
            codecs: 0b111,
            hde: 1,
            streams: 8,
            window: 8 << 20,
            ..Offer::default()
        }
    }

    #[test]
    fn references_go_to_what_the_destination_holds_and_where_both_sides_know_them() {
        let mapped = Offer { hde: 2, mapped: vec![b"pc.ram".to_vec()], cache_pages: 9, ..offer() };
        let cached = Offer { hde: 2, unmapped: "private".into(), cache_pages: 9, ..offer() };
        let choose = |source: &Offer, destination: &Offer, mode| {
            let choice = choose(source, destination, Wish::default(), mode).unwrap();
            assert_eq!(permits(&choice, source, destination), Ok(()));
            (choice.mapped, choice.cache_pages, choice.reasons.len())
        };
        let new = Offer { hde: 2, ..offer() };
        assert_eq!(choose(&new, &mapped, Mode::Internet), (true, 0, 0));
        assert_eq!(choose(&new, &cached, Mode::Internet), (false, 9, 1));
        assert_eq!(choose(&new, &mapped, Mode::Datacenter), (true, 0, 0));
        assert_eq!(choose(&new, &cached, Mode::Datacenter), (false, 0, 1));
        assert_eq!(choose(&offer(), &mapped, Mode::Internet), (false, 0, 0));

        let first = super::choose(&new, &mapped, Wish::default(), Mode::Internet).unwrap();
        let again = choose_again(&new, &mapped, wish(Path::V3), Mode::Internet, &first).unwrap();
        assert_eq!((again.mapped, again.cache_pages), (false, 9));
        assert_eq!(permits_again(&again, &new, &mapped), Ok(()));
        assert!(permits_again(&first, &new, &mapped).is_err());
        for bad in [
            Choice { cache_pages: 9, ..first.clone() },
            Choice { hde: 1, ..first.clone() },
            Choice { mapped: false, cache_pages: 10, ..first.clone() },
        ] {
            assert!(permits(&bad, &new, &mapped).is_err(), "{bad:?}");
        }
        assert!(permits(&first, &new, &cached).is_err());
        let wordy = Offer { mapped: vec![Vec::new(); MAX_MAPPED + 1], ..mapped };
        assert!(super::choose(&new, &wordy, Wish::default(), Mode::Internet).is_err());
    }

    #[test]
    fn a_lane_has_the_window_that_both_sides_have_and_none_with_an_older_agent() {
        let lane = |lane_window| Offer { hde: 2, mapped: vec![b"pc.ram".to_vec()], lane_window, ..offer() };
        let window = |a: &Offer, b: &Offer, mode| {
            let choice = choose(a, b, Wish::default(), mode).unwrap();
            assert_eq!(permits(&choice, a, b), Ok(()));
            choice.lane_window
        };
        let (small, large) = (lane(5 << 20), lane(1 << 40));
        assert_eq!(window(&large, &small, Mode::Internet), 4 << 20);
        assert_eq!(window(&small, &large, Mode::Internet), 4 << 20);
        assert_eq!(window(&large, &large, Mode::Internet), MAX_LANE_WINDOW);
        for (a, b) in [(&large, &lane(0)), (&lane(0), &large), (&large, &lane(MIN_LANE_WINDOW - 1))] {
            assert_eq!(window(a, b, Mode::Internet), 0);
        }
        assert_eq!(window(&large, &large, Mode::Datacenter), 0);
        let nothing_held = Offer { mapped: Vec::new(), ..large.clone() };
        assert_eq!(window(&large, &nothing_held, Mode::Internet), 0);

        let good = choose(&large, &small, Wish::default(), Mode::Internet).unwrap();
        for lane_window in [8 << 20, 3 << 20, MIN_LANE_WINDOW / 2, MAX_LANE_WINDOW * 2, 1] {
            assert!(permits(&Choice { lane_window, ..good.clone() }, &large, &small).is_err());
        }
        assert!(permits(&Choice { mapped: false, ..good.clone() }, &large, &small).is_err());
        assert!(permits(&Choice { mode: 1, ..good }, &large, &small).is_err());
        let later = choose_again(
            &large,
            &Offer { cache_pages: 9, ..small.clone() },
            wish(Path::V3),
            Mode::Internet,
            &choose(&large, &small, Wish::default(), Mode::Internet).unwrap(),
        )
        .unwrap();
        assert_eq!(later.lane_window, 4 << 20);
    }

    fn wish(path: Path) -> Wish {
        Wish { path: Some(path), ..Wish::default() }
    }

    fn path_of(choice: &Choice) -> Path {
        Path::from_wire(choice.path).unwrap()
    }

    #[test]
    fn v3_where_both_sides_allow_it() {
        let choice = choose(&offer(), &offer(), Wish::default(), Mode::Internet).unwrap();
        assert_eq!((path_of(&choice), choice.reasons.len()), (Path::V3, 0));
        assert_eq!(permits(&choice, &offer(), &offer()), Ok(()));
    }

    #[test]
    fn a_v1_only_peer_gets_v1_and_the_reason_is_kept() {
        let v1_only = Offer { v3: false, v3_reason: "configured without = v1".into(), ..offer() };
        let choice = choose(&offer(), &v1_only, Wish::default(), Mode::Internet).unwrap();
        assert_eq!(path_of(&choice), Path::V1);
        assert!(choice.reasons[0].contains("configured without = v1"), "{:?}", choice.reasons);
        let forced = Wish { path: Some(Path::V3), ..Wish::default() };
        assert!(matches!(
            choose(&offer(), &v1_only, forced, Mode::Internet),
            Err(Impossible::V3Barred(why)) if why.contains("destination")
        ));
    }

    #[test]
    fn policy_bars_v1() {
        let never = Offer { v1: 0, ..offer() };
        let near = Offer { v1: 1, ..offer() };
        let wish = Wish { path: Some(Path::V1), ..Wish::default() };
        assert_eq!(choose(&never, &offer(), wish, Mode::Datacenter), Err(Impossible::V1Barred("source")));
        assert_eq!(choose(&offer(), &near, wish, Mode::Internet), Err(Impossible::V1Barred("destination")));
        assert!(choose(&offer(), &near, wish, Mode::Datacenter).is_ok());
        let off = Offer { v3: false, v3_reason: "flag off".into(), v1: 0, ..offer() };
        assert!(matches!(
            choose(&off, &offer(), Wish::default(), Mode::Datacenter),
            Err(Impossible::Nothing { side: "source", .. })
        ));
    }

    #[test]
    fn plain_tcp_needs_both_policies_and_a_short_link() {
        let plain = Offer { v1_plain: true, v3_plain: true, ..offer() };
        let choose = |a: &Offer, b: &Offer, link| super::choose(a, b, Wish::default(), link).unwrap().plain;
        assert!(choose(&plain, &plain, Mode::Datacenter));
        assert!(!choose(&plain, &offer(), Mode::Datacenter));
        assert!(!choose(&plain, &plain, Mode::Internet));
    }

    #[test]
    fn quic_where_it_is_wished_for_both_sides_have_it_and_the_leg_is_v3s_over_a_long_way() {
        let able = Offer { quic: true, ..offer() };
        let wish = Wish { quic: true, ..Wish::default() };
        let choose = |a: &Offer, b: &Offer, wish, link| {
            let choice = super::choose(a, b, wish, link).unwrap();
            assert_eq!(permits(&choice, a, b), Ok(()));
            choice
        };
        let first = choose(&able, &able, wish, Mode::Internet);
        assert!(first.quic);
        assert!(!choose(&able, &able, Wish::default(), Mode::Internet).quic);
        assert!(!choose(&able, &able, wish, Mode::Datacenter).quic);
        assert!(!choose(&able, &able, Wish { path: Some(Path::V1), ..wish }, Mode::Internet).quic);
        for (a, b) in [(&able, &offer()), (&offer(), &able)] {
            assert!(!choose(a, b, wish, Mode::Internet).quic, "an older agent");
            assert_eq!(permits(&first, a, b), Err("QUIC is not in both offers"));
        }
        for bad in [Choice { mode: 1, ..first.clone() }, Choice { path: 1, streams: 1, ..first.clone() }] {
            assert!(permits(&bad, &able, &able).is_err(), "{bad:?}");
        }
        let back = Wish { path: Some(Path::V3), ..wish };
        assert!(choose_again(&able, &able, back, Mode::Internet, &first).unwrap().quic);
    }

    #[test]
    fn a_later_leg_stays_within_the_offers_whatever_the_flag_said() {
        let off = Offer { v3: false, ..offer() };
        let first = choose(&off, &offer(), Wish::default(), Mode::Internet).unwrap();
        assert_eq!(path_of(&first), Path::V1);
        let v3 = choose_again(&off, &offer(), wish(Path::V3), Mode::Internet, &first).unwrap();
        assert_eq!((path_of(&v3), v3.streams), (Path::V3, 4));
        assert_eq!(permits_again(&v3, &off, &offer()), Ok(()));
        assert!(permits(&v3, &off, &offer()).is_err());
        let never = Offer { v1: 0, ..offer() };
        assert_eq!(
            choose_again(&never, &offer(), wish(Path::V1), Mode::Internet, &v3),
            Err(Impossible::V1Barred("source"))
        );
        assert!(permits_again(&first, &offer(), &never).is_err());
    }

    #[test]
    fn downgrade_v1_a_choice_outside_the_offers_is_not_permitted() {
        let good = choose(&offer(), &offer(), Wish::default(), Mode::Internet).unwrap();
        let bad = [
            Choice { path: 2, ..good.clone() },
            Choice { plain: true, mode: 1, ..good.clone() },
            Choice { streams: 0, ..good.clone() },
            Choice { streams: 99, ..good.clone() },
            Choice { window: u64::MAX, ..good.clone() },
            Choice { hde: 2, ..good.clone() },
            Choice { hde: 0, ..good.clone() },
            Choice { reasons: vec!["x".repeat(MAX_REASON + 1)], ..good.clone() },
            Choice { mode_reason: "x".repeat(MAX_REASON + 1), ..good.clone() },
            Choice { transport_reason: "x".repeat(MAX_REASON + 1), ..good.clone() },
        ];
        for choice in bad {
            assert!(permits(&choice, &offer(), &offer()).is_err(), "{choice:?}");
        }
        let never = Offer { v1: 0, ..offer() };
        let v1 = Choice { path: 1, streams: 1, ..good };
        assert!(permits(&v1, &offer(), &never).is_err());
        let near = Offer { v1: 1, ..offer() };
        assert!(permits(&v1, &offer(), &near).is_err(), "an internet link");
        assert!(permits(&Choice { mode: 1, ..v1 }, &offer(), &near).is_ok());
    }
}
