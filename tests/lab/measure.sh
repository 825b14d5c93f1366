# L1: runs heddle with a guest that does `measure`, and reads KVM's counters (sums over the guests
# that live) and the clock when the guest has come to certain lines. Leaves lines "WHEN NAME VALUE"
# in `counts`. STOP and TRACE are set above.
kvm=/sys/kernel/debug/kvm
events=/sys/kernel/tracing/events/kvm
return=$(printf '\r')

count() {
    for name in exits host_state_reload io_exits mmio_exits halt_exits irq_exits irq_injections; do
        read -r value <$kvm/$name && echo "$1 $name $value"
    done
    # What the threads of heddle were given to do. host_state_reload also counts when a vCPU sleeps.
    awk -v when=$1 '/Hits:/ { print when, "userspace", $2 }' $events/kvm_userspace_exit/hist
}

# Nanoseconds; with -icount each is an instruction, or the wait for a timer while L1 is idle.
clock() {
    while read -r now at ns rest; do
        [ "$now $at" = "now at" ] && echo "$1 ns $ns" && break
    done </proc/timer_list
    # Waiting for the disk is told apart there.
    read -r cpu user nice system idle iowait rest </proc/stat
    awk -v when=$1 -v ticks=$((idle + iowait)) 'BEGIN { print when, "idle-s", ticks / 100 }'
}

# Guest memory is the one mapping of this size.
private() {
    awk '/^Size:/ { guest = $2 >= 262144 }
         /^Private_/ && !guest { kib += $2 }
         END { print "idle private-kib " kib }' /proc/$heddle/smaps
    # The largest ones, for people.
    awk '/^[0-9a-f]+-[0-9a-f]+ / { name = $1 " " $2 " " $6 }
         /^Size:/ { guest = $2 >= 262144 }
         /^Private_/ && !guest && $2 > 64 { print $2, $1, name }' /proc/$heddle/smaps |
        sort -rn >smaps
}

histogram() {
    echo "hist:keys=$2" >/tmp/$1
    cat /tmp/$1 >$events/$1/trigger
}

no_histogram() {
    read -r keys </tmp/$1
    echo "!$keys" >$events/$1/trigger
}

if [ $TRACE = yes ]; then
    histogram kvm_pio rw,port.hex
    histogram kvm_mmio type,gpa.hex
    histogram kvm_exit exit_reason.hex
    histogram kvm_msr write,ecx.hex
fi
histogram kvm_userspace_exit reason
mkfifo /tmp/console.$$
# What is read for the first time costs the wait for L1's disk, and under -icount that is a matter of
# chance: the first of several jobs paid for all. So it lies in the page cache. Where memory is
# counted it does not: of a program in the page cache more is mapped at once.
if [ "$STOP" = ready ]; then
    cat /lab/heddle /lab/vmlinux /lab/vmlinuz /lab/initrd vm.toml disk.img /lib/*/* /lib64/* \
        >/dev/null 2>&1
fi
clock start >counts
/lab/heddle run vm.toml --timeout 400s >/tmp/console.$$ 2>stderr.txt </dev/null &
heddle=$!
while read -r line; do
    echo "$line" >>console.txt
    set -- ${line%$return}
    [ "$1" = LAB ] || continue
    case $2 in
    init) clock init && count init ;;
    ready)
        count ready
        if [ $TRACE = yes ]; then
            for event in kvm_pio kvm_mmio kvm_exit kvm_msr; do
                cat $events/$event/hist >$event
            done
            cat $events/kvm_userspace_exit/hist >kvm_userspace_exit
        fi
        ;;
    idle) private ;;
    begin | end) count "$3-$2" ;;
    esac >>counts
    [ "$2" = "$STOP" ] && kill $heddle
done </tmp/console.$$
wait $heddle
code=$?
[ $TRACE = yes ] || no_histogram kvm_userspace_exit
[ -n "$STOP" ] && exit 0
exit $code
