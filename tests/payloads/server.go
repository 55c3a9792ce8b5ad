// What Go's runtime does with a kernel: goroutines on threads, a child, a fault that becomes a
// panic, preemption of a loop, an HTTP server, signals.
package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

func fault() {
	defer func() { fmt.Println("recovered", recover() != nil) }()
	var nowhere *int
	*nowhere = 1
}

func main() {
	var group sync.WaitGroup
	var mutex sync.Mutex
	count := 0
	for i := 0; i < 50; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for j := 0; j < 100; j++ {
				mutex.Lock()
				count++
				mutex.Unlock()
			}
		}()
	}
	group.Wait()
	fmt.Println("count", count)
	said, err := exec.Command("/bin/echo", "child").Output()
	fmt.Print(string(said), err, "\n")
	fault()
	done := make(chan bool)
	go func() {
		for {
			select {
			case <-done:
				return
			default:
			}
		}
	}()
	time.Sleep(10 * time.Millisecond)
	done <- true
	listener, _ := net.Listen("tcp", "127.0.0.1:0")
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "go ", r.URL.Path)
	}))
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM)
	<-ends
	os.Exit(5)
}
