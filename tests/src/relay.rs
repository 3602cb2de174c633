//! A TCP relay between two agents, whose connections can all be reset at once, or one of them be held up.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use rustix::net::sockopt::set_socket_linger;

/// How often a connection that is silent, or whose reader is slow, is asked whether it was cut.
const PERIOD: Duration = Duration::from_millis(10);

/// Listens on loopback and passes on what comes, both ways, until it is dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Connections that were made under a smaller number are reset.
    cuts: AtomicU64,
    /// New connections are reset at once.
    down: AtomicBool,
    /// Bytes read to be passed on, both ways.
    passed: AtomicU64,
    ended: AtomicBool,
    /// All that were made, in that order.
    connections: Mutex<Vec<Arc<Connection>>>,
}

#[derive(Debug, Default)]
struct Connection {
    /// Bytes read to be passed on towards the destination.
    passed: AtomicU64,
    /// It stays open, and nothing comes through any more.
    stalled: AtomicBool,
    ended: AtomicBool,
}

impl Relay {
    /// Begins to relay to this address.
    ///
    /// # Errors
    /// There is no port to listen on.
    pub fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let state = Arc::new(State::default());
        std::thread::spawn({
            let state = Arc::clone(&state);
            move || {
                for stream in listener.incoming().flatten() {
                    if state.ended.load(Ordering::SeqCst) {
                        break;
                    }
                    state.accept(stream, to);
                }
            }
        });
        Ok(Relay { address, state })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that it took to pass on so far, both ways.
    pub fn passed(&self) -> u64 {
        self.state.passed.load(Ordering::SeqCst)
    }

    /// Resets every connection, at both ends and with all that is under way in it, and every new one until
    /// [`Relay::mend`].
    pub fn cut(&self) {
        self.state.down.store(true, Ordering::SeqCst);
        self.state.cuts.fetch_add(1, Ordering::SeqCst);
    }

    /// Holds up the connection that has carried the most towards the destination: it stays open, and nothing comes through.
    pub fn stall_busiest(&self) {
        let connections = self.state.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let over = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        let flowing =
            connections.iter().filter(|connection| !over(&connection.stalled) && !over(&connection.ended));
        if let Some(busiest) = flowing.max_by_key(|connection| connection.passed.load(Ordering::SeqCst)) {
            busiest.stalled.store(true, Ordering::SeqCst);
        }
    }

    /// Lets new connections through again.
    pub fn mend(&self) {
        self.state.down.store(false, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
        self.state.ended.store(true, Ordering::SeqCst);
        // Wakes the listener.
        let _ = TcpStream::connect(self.address);
    }
}

impl State {
    /// Passes on between `near` and a new connection to `far`, in two threads that end with either of them.
    fn accept(self: &Arc<Self>, near: TcpStream, far: SocketAddr) {
        let cuts = self.cuts.load(Ordering::SeqCst);
        if self.down.load(Ordering::SeqCst) {
            return reset(&near);
        }
        let Ok(far) = TcpStream::connect(far) else { return reset(&near) };
        for stream in [&near, &far] {
            let _ = stream.set_nodelay(true);
            let _ = stream.set_read_timeout(Some(PERIOD));
            let _ = stream.set_write_timeout(Some(PERIOD));
        }
        // Whoever is last closes both.
        let pair = Arc::new((near, far));
        let connection = Arc::new(Connection::default());
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&connection));
        for forward in [true, false] {
            let (state, pair, connection) = (Arc::clone(self), Arc::clone(&pair), Arc::clone(&connection));
            std::thread::spawn(move || {
                let (near, far) = &*pair;
                let (from, to) = if forward { (near, far) } else { (far, near) };
                let carried = forward.then_some(&connection.passed);
                if state.pass(from, to, carried, &connection.stalled, cuts).is_err() {
                    reset(near);
                    reset(far);
                }
                connection.ended.store(true, Ordering::SeqCst);
            });
        }
    }

    /// Copies until the end, which it passes on as well.
    fn pass(
        &self,
        mut from: &TcpStream,
        mut to: &TcpStream,
        carried: Option<&AtomicU64>,
        stalled: &AtomicBool,
        cuts: u64,
    ) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let read = self.patiently(cuts, || from.read(&mut buffer))?;
            if read == 0 {
                self.while_stalled(cuts, stalled)?;
                return to.shutdown(std::net::Shutdown::Write);
            }
            // Counted first: who has read a byte finds it counted.
            self.passed.fetch_add(read as u64, Ordering::SeqCst);
            if let Some(carried) = carried {
                carried.fetch_add(read as u64, Ordering::SeqCst);
            }
            let mut rest = &buffer[..read];
            while !rest.is_empty() {
                self.while_stalled(cuts, stalled)?;
                let written = self.patiently(cuts, || to.write(rest))?;
                rest = &rest[written..];
            }
        }
    }

    /// Waits for a stall to end, or for a cut. To be asked after each read: that may have begun before the stall.
    fn while_stalled(&self, cuts: u64, stalled: &AtomicBool) -> std::io::Result<()> {
        let through = || match stalled.load(Ordering::SeqCst) {
            false => Ok(0),
            true => {
                std::thread::sleep(PERIOD);
                Err(ErrorKind::WouldBlock.into())
            }
        };
        self.patiently(cuts, through).map(|_| ())
    }

    /// Tries again as often as the time runs out, until a cut.
    fn patiently(
        &self,
        cuts: u64,
        mut attempt: impl FnMut() -> std::io::Result<usize>,
    ) -> std::io::Result<usize> {
        loop {
            if self.cuts.load(Ordering::SeqCst) != cuts {
                return Err(ErrorKind::ConnectionReset.into());
            }
            match attempt() {
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                done => return done,
            }
        }
    }
}

/// Has the kernel send a reset, not an orderly end, when the last owner closes.
fn reset(stream: &TcpStream) {
    let _ = set_socket_linger(stream, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection through the relay, and its other end.
    fn through(relay: &Relay, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let near = TcpStream::connect(relay.address()).unwrap();
        let (far, _) = listener.accept().unwrap();
        near.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        far.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        (near, far)
    }

    #[test]
    fn a_cut_resets_both_ends_and_what_comes_until_it_is_mended() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::start(listener.local_addr().unwrap()).unwrap();
        let (mut near, mut far) = through(&relay, &listener);
        near.write_all(b"over").unwrap();
        let mut word = [0; 4];
        far.read_exact(&mut word).unwrap();
        assert_eq!((&word, relay.passed()), (b"over", 4));

        relay.cut();
        let ended = |stream: &mut TcpStream| stream.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(ended(&mut near), Err(ErrorKind::ConnectionReset));
        assert_eq!(ended(&mut far), Err(ErrorKind::ConnectionReset));
        let mut refused = TcpStream::connect(relay.address()).unwrap();
        assert_eq!(ended(&mut refused), Err(ErrorKind::ConnectionReset));

        relay.mend();
        let (near, mut far) = through(&relay, &listener);
        drop(near);
        assert_eq!(ended(&mut far), Ok(0), "an orderly end stays one");
    }

    #[test]
    fn a_stall_holds_up_the_busiest_connection_only() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::start(listener.local_addr().unwrap()).unwrap();
        let mut busy = through(&relay, &listener);
        let mut other = through(&relay, &listener);
        let mut word = [0; 4];
        busy.0.write_all(b"over").unwrap();
        busy.1.read_exact(&mut word).unwrap();
        relay.stall_busiest();
        busy.0.write_all(b"lost").unwrap();
        other.0.write_all(b"goes").unwrap();
        other.1.read_exact(&mut word).unwrap();
        assert_eq!(&word, b"goes");
        busy.1.set_nonblocking(true).unwrap();
        assert_eq!(busy.1.read(&mut word).map_err(|error| error.kind()), Err(ErrorKind::WouldBlock));
    }
}
